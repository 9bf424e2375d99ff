"""The search trials of another engine: its defaults, then what forecasts or a sampler say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from autotune.external_search.choose import Chooser
from autotune.external_search.evaluator import ExternalEvaluator, Rival, Screening
from autotune.external_search.forecast import Forecasts
from autotune.external_search.prepare import PreparedExternal
from autotune.external_search.served import longest_of
from autotune.external_search.space import FlagConfig
from autotune.external_search.step_costs import LinearCost, fit_cost
from autotune.records import RunFolder, TrialRecord
from autotune.search.events import Listener
from autotune.search.forecast import Choice
from autotune.search.proof import ranked
from autotune.search.spending import Spending
from autotune.search.study import Study
from autotune.search.trial_simulator import TrialSimulator, shortened
from autotune.search.trials import TrialRunner
from autotune.search.windows import read_windows

# Of a long window the beginning is simulated: choosing must cost little beside measuring.
_SIMULATED_TOKENS = 16_000.0
_FEWEST_REQUESTS = 60
# The space counts as exhausted after so many suggestions in a row that were measured before.
_MAX_REPEATS = 50


class ExternalExploration:
    """Measures points of the space until the budget or the space ends.

    Args:
        prepared: what the run works with.
        folder: the run.
        listener: told of each trial.
        trials: measures.
        evaluator: is told which trials get a short load first; None: it knows none.
        spending: says how long to go on.
        searched: search trials so far; each is added as it ends.
        note: keeps a note for the result and tells it.
    """

    def __init__(
        self,
        prepared: PreparedExternal,
        folder: RunFolder,
        listener: Listener,
        trials: TrialRunner,
        evaluator: ExternalEvaluator | None,
        spending: Spending,
        searched: list[TrialRecord],
        note: Callable[[str], None],
    ) -> None:
        self._prepared = prepared
        self._options = prepared.options
        self._slo = prepared.options.parsed_slo
        self._objective = prepared.options.parsed_objective
        self._folder = folder
        self._listener = listener
        self._trials = trials
        self._evaluator = evaluator
        self._spending = spending
        self._searched = searched
        self._note = note
        self._study: Study[FlagConfig] | None = None
        self._chooser: tuple[int, Chooser] | None = None

    def measure_default(self) -> None:
        """Measure the default, to which every claim compares, whatever happens later."""
        if self._searched:
            return
        left = self._spending.left()
        self._listener.phase("search", left, self._spending.expected_trials())
        start = self._prepared.space.point_in({}, self._prepared.base)
        assert start is not None, "the default's values are in the space"
        self._measure("default", start)

    def explore(self) -> None:
        """Measure points until the budget or the space ends."""
        study = self._opened_study()
        expected = self._spending.expected_trials()
        left = max(0, expected - len(self._searched))
        self._listener.phase("search", self._spending.left(), left)
        if self._options.sampler == "simulator":
            self._follow_forecasts(study)
        else:
            self._sample(study)

    def importances(self) -> dict[str, float]:
        """What each knob explains of the objective; see `Study.importances`."""
        return self._opened_study().importances() if self._searched else {}

    def best(self) -> TrialRecord | None:
        """The best search trial so far."""
        return next(iter(ranked(self._searched, self._objective)), None)

    def _follow_forecasts(self, study: Study[FlagConfig]) -> None:
        while self._spending.pays_for_trial():
            chooser = self._opened_chooser()
            choice: Choice | None = chooser.choose(self._searched, self._is_known)
            if choice is None:
                self._note("every configuration that is known not to be refused was measured")
                return
            suggestion = study.take(choice.source, choice.point)
            predicted = None
            if choice.forecast is not None:
                predicted = {**choice.forecast.to_json(), "after_trials": len(self._searched)}
            study.tell(suggestion, self._measure(choice.source, choice.point, predicted))

    def _sample(self, study: Study[FlagConfig]) -> None:
        """Optuna's own sampler, after the ends of each knob's values."""
        seeds = self._prepared.space.seeds(self._prepared.base)
        most = max(1, self._spending.expected_trials() // 2)
        for source, point in seeds[: 1 + most]:
            study.enqueue(source, point)
        repeats = 0
        while self._spending.pays_for_trial() and repeats < _MAX_REPEATS:
            suggestion = study.ask()
            known = self._record_at(suggestion.point)
            if known is not None:
                repeats += 1
                study.tell(suggestion, known)
                continue
            refusal = self._prepared.space.refusal(suggestion.point, self._prepared.base)
            if refusal is not None:
                # Nothing was started: of no interest to a reader of the records.
                repeats += 1
                study.forget(suggestion)
                continue
            repeats = 0
            study.tell(suggestion, self._measure(suggestion.source, suggestion.point))

    def _opened_study(self) -> Study[FlagConfig]:
        if self._study is None:
            self._study = Study(
                self._folder.journal,
                self._prepared.space,
                self._objective,
                self._options.seed,
                self._searched,
                self._prepared.base,
                "random" if self._options.sampler == "random" else "tpe",
            )
        return self._study

    def _opened_chooser(self) -> Chooser:
        """Fitted to the first trial that ran: to all later ones the corrections are learned."""
        ran = [r for r in self._searched if r.outcome == "ok"]
        version = ran[0].number if ran else -1
        if self._chooser is None or self._chooser[0] != version:
            forecasts = self._forecasts(ran[0]) if ran else None
            chooser = Chooser(
                self._prepared.space,
                self._prepared.base,
                self._slo,
                self._objective,
                self._options.seed,
                _unknown if forecasts is None else forecasts.simulate,
                () if forecasts is None else forecasts.played(self._prepared.space.values),
            )
            self._chooser = version, chooser
            if forecasts is None and ran:
                self._note(
                    "trials are chosen without simulated ones: the answers of the first trial are "
                    "too few to tell what a step costs"
                )
        return self._chooser[1]

    def _forecasts(self, record: TrialRecord) -> Forecasts | None:
        prepared = self._prepared
        cost: LinearCost | None = fit_cost(self._folder.read_requests(record.number))
        if cost is None:
            return None
        window = read_windows(self._folder)[0]
        at_once = self._options.traffic.rate == float("inf")
        simulator = TrialSimulator(self._slo, self._objective, prepared.schedule, at_once)
        if self._objective.name == "capacity" and record.objective and record.rate:
            offered = len(window) / max(1e-9, window[-1].arrival_s)
            simulator.start = record.objective / offered
        facts: Mapping[str, Any] = ((record.metrics or {}).get("server") or {}).get("facts") or {}
        told = facts.get("kv_cache_tokens")
        return Forecasts(
            prepared.engine.table,
            cost,
            shortened(window, _SIMULATED_TOKENS, _FEWEST_REQUESTS),
            float(told) if isinstance(told, (int, float)) and told > 0 else None,
            longest_of(self._folder),
            simulator,
            self._slo,
            self._objective,
        )

    def _is_known(self, point: Mapping[str, Any]) -> bool:
        return self._record_at(point) is not None

    def _record_at(self, point: Mapping[str, Any]) -> TrialRecord | None:
        for record in self._searched:
            if all(record.config.get(name) == value for name, value in point.items()):
                return record
        return None

    def _measure(
        self, source: str, point: Mapping[str, Any], predicted: Mapping[str, Any] | None = None
    ) -> TrialRecord:
        base = self._prepared.base
        config = self._prepared.space.config_of(point, base)
        values = config.to_dict()
        changes = {n: v for n, v in values.items() if v != base.values.get(n)}
        self._listener.trial_started(self._trials.next_number, source, changes)
        if self._evaluator is not None:
            self._evaluator.screening = self._screening()
        try:
            record = self._trials.run("search", source, config, predicted=predicted)
        finally:
            if self._evaluator is not None:
                self._evaluator.screening = None
        self._searched.append(record)
        self._listener.trial_ended(record, self.best())
        return record

    def _screening(self) -> Screening | None:
        """A short load comes first where a trial is a single load that goes on for a while."""
        seconds = self._options.short_share * self._prepared.schedule.window_s
        if not seconds or self._objective.name == "capacity":
            return None
        if self._options.traffic.rate == float("inf"):
            return None
        best = self.best()
        told = ((best.metrics or {}).get("short_load") or {}) if best is not None else {}
        if best is None or "worth" not in told:
            return Screening(seconds, None)
        return Screening(seconds, Rival(best.number, float(told["worth"])))


def _unknown(_: FlagConfig) -> None:
    return None
