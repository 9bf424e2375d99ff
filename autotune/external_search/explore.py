"""The search trials of another engine: its defaults, then what forecasts or a sampler say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autotune.external_search.choose import Chooser
from autotune.external_search.evaluator import ExternalEvaluator, Rival, Screening
from autotune.external_search.forecast import Forecasts
from autotune.external_search.prepare import PreparedExternal
from autotune.external_search.served import longest_of
from autotune.external_search.space import FlagConfig
from autotune.external_search.step_costs import LinearCost, fit_cost
from autotune.records import TrialRecord
from autotune.search.explorer import MAX_REPEATS, Explorer
from autotune.search.forecast import Choice
from autotune.search.study import Study
from autotune.search.trial_simulator import TrialSimulator, shortened
from autotune.search.windows import read_windows

# Of a long window the beginning is simulated: choosing must cost little beside measuring.
_SIMULATED_TOKENS = 16_000.0
_FEWEST_REQUESTS = 60


class ExternalExploration(Explorer[PreparedExternal]):
    """Measures another engine's flags.

    `evaluator` is told which trials get a short load first; None: it knows none.
    """

    evaluator: ExternalEvaluator | None = None
    _chooser: tuple[int, Chooser] | None = None

    def explore(self) -> None:
        """Measure points until the budget or the space ends."""
        study = self._study()
        self._tell_phase()
        if self._options.sampler == "simulator":
            self._follow_forecasts(study)
        else:
            self._sample(study)

    def _follow_forecasts(self, study: Study[FlagConfig]) -> None:
        while self._spending.pays_for_trial():
            chooser = self._opened_chooser()
            choice: Choice | None = chooser.choose(
                self._searched, lambda point: self._known(point) is not None
            )
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
        while self._spending.pays_for_trial() and repeats < MAX_REPEATS:
            suggestion = study.ask()
            known = self._known(suggestion.point)
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

    def _measure(
        self, source: str, point: Mapping[str, Any], predicted: Mapping[str, Any] | None = None
    ) -> TrialRecord:
        base = self._prepared.base
        config = self._prepared.space.config_of(point, base)
        values = config.to_dict()
        changes = {n: v for n, v in values.items() if v != base.values.get(n)}
        self._listener.trial_started(self._trials.next_number, source, changes)
        if self.evaluator is not None:
            self.evaluator.screening = self._screening()
        try:
            record = self._trials.run("search", source, config, predicted=predicted)
        finally:
            if self.evaluator is not None:
                self.evaluator.screening = None
        self._searched.append(record)
        self._listener.trial_ended(record, self.best())
        return record

    def _screening(self) -> Screening | None:
        """A short load comes first where a trial is a single load that goes on for a while."""
        seconds = self._prepared.options.short_share * self._prepared.schedule.window_s
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
