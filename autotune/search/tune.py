"""The whole search: calibrate, search, prove, decide; resumable at any point."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from autotune.errors import Interrupted
from autotune.quality_guard import qualities, uncertain_limits
from autotune.records import RunFolder, TrialRecord
from autotune.search.advised import advise_search, infeasible_winner
from autotune.search.evaluator import Evaluator, TrialEvaluator
from autotune.search.events import Listener, Silent
from autotune.search.explore import Exploration
from autotune.search.forecasting import open_guide
from autotune.search.guide import Guide
from autotune.search.options import TuneOptions
from autotune.search.prepare import Prepared, conclude, offer_traffic, open_folder, prepare
from autotune.search.probing import Probing
from autotune.search.proof import Contender, choose_finalists, judge
from autotune.search.scoreboard import scoreboard
from autotune.search.spending import Spending
from autotune.search.trials import TrialRunner
from autotune.search.verdict import changed_knobs, result_json
from engine.config import EngineConfig


def tune(
    options: TuneOptions | None,
    path: Path,
    *,
    command: Sequence[str] = (),
    stop: threading.Event | None = None,
    listener: Listener | None = None,
    evaluator: TrialEvaluator | None = None,
    clock: Callable[[], float] | None = None,
) -> dict[str, Any]:
    """Tune the engine for a workload and an SLO; returns the content of `run.json`.

    Args:
        options: what to do; None resumes the run in `path`.
        path: the run folder; it must not exist, or be empty, unless a run is resumed.
        command: the command line, for the record.
        stop: set it to stop cleanly; what was measured is kept.
        listener: told of progress.
        evaluator: measures in place of the trial process, which is started without it.
        clock: seconds, for the budget; `time.monotonic` without it.

    Raises:
        BadInput: options that make no sense, or a folder that cannot be used.
        EnvironmentMissing: no disk space, or the trial process does not start.
        Interrupted: `stop` was set; `run.json` says so and the run can be resumed.
        engine.errors.EngineError: the model cannot be used.
    """
    clock = clock or time.monotonic
    began = clock()
    listener = listener or Silent()
    stop = stop or threading.Event()
    with open_folder(path, resume=options is None) as folder:
        prepared = prepare(folder, options, command)
        if prepared.run["status"] == "done":
            listener.note(f"{path} is finished; nothing is measured again")
            return prepared.run
        with contextlib.ExitStack() as stack:
            if evaluator is None:
                evaluator = stack.enter_context(Evaluator(folder, stop, listener.progress))
            search = _Search(prepared, folder, evaluator, listener, clock, began, stop)
            try:
                search.go()
            except Interrupted:
                # Before the proof there is a best trial, which the records tell, but no result.
                result = search.result() if search.proof_has_intervals else None
                conclude(folder, prepared.run, "interrupted", result)
                raise
        conclude(folder, prepared.run, "done", search.result())
        return prepared.run


class _Search:
    """One run under way, which this process began to work on when `clock` said `began`."""

    def __init__(
        self,
        prepared: Prepared,
        folder: RunFolder,
        evaluator: TrialEvaluator,
        listener: Listener,
        clock: Callable[[], float],
        began: float,
        stop: threading.Event,
    ) -> None:
        self._stop = stop
        self._prepared = prepared
        self._options = prepared.options
        self._folder = folder
        self._evaluator = evaluator
        self._listener = listener
        self._slo = prepared.options.parsed_slo
        self._objective = prepared.options.parsed_objective
        self._at_once = prepared.options.traffic.rate == math.inf
        earlier = folder.read_trials()
        self._calibration = [t for t in earlier if t.kind == "calibration"]
        self._searched = [t for t in earlier if t.kind == "search"]
        self._proof = [t for t in earlier if t.kind == "proof"]
        self._advice: list[dict[str, Any]] = []
        self._guide: Guide | None = None
        self._spending = Spending(
            prepared.schedule,
            prepared.options.trials,
            lambda: clock() - began,
            sum(t.seconds for t in earlier) + prepared.advising_s,
            self._searched,
            self._proof,
        )
        self._trials = TrialRunner(
            folder,
            evaluator,
            self._slo,
            self._objective,
            prepared.schedule,
            prepared.options.seed,
            next_number=1 + max((t.number for t in earlier), default=-1),
            at_once=self._at_once,
            clock=clock,
        )
        self._exploration = Exploration(
            prepared,
            folder,
            listener,
            self._trials,
            self._spending,
            self._searched,
            self._note,
        )

    def go(self) -> None:
        """Measure all that is not on disk yet."""
        self._offer_traffic()
        self._exploration.measure_default()
        probing = Probing(self._prepared, self._folder, self._evaluator, self._note)
        self._advice = advise_search(
            self._prepared,
            self._folder,
            probing,
            self._listener,
            self._spending,
            self._searched,
            self._note,
        )
        self._guide = open_guide(
            self._prepared,
            self._folder,
            probing,
            self._listener,
            self._spending,
            self._searched,
            self._note,
            self._stop,
        )
        if not self._proof:
            self._exploration.explore(self._advice, self._guide)
        self._prove()
        self._listener.phase("done", None, None)

    def result(self) -> dict[str, Any] | None:
        """The result as far as the records go; None if not even the default was measured."""
        if not self._searched:
            return None
        configs = [self._searched[0].config, *(t.config for t in self._finalists())]
        # Without a proof the search's own trials are shown, and nothing counts as proven.
        trials = self._proof or [t for t in self._searched if t.config in configs]
        contenders = judge(
            self._folder,
            configs,
            trials,
            slo=self._slo,
            objective=self._objective,
            confidence=self._options.confidence,
            seed=self._options.seed,
        )
        if contenders[0].metrics is None and all(c.metrics is None for c in contenders):
            return None
        result = result_json(
            contenders,
            self._objective,
            self._objective.unit(self._slo),
            self._exploration.importances(),
            [*self._prepared.notes, *self._quality_notes(contenders)],
            qualities(self._searched, self._slo),
        )
        result["scoreboard"] = scoreboard(
            self._advice,
            [*self._searched, *self._proof],
            capacity=self._objective.name == "capacity",
            at_once=self._at_once,
        )
        result["infeasible"] = (
            []
            if result["slo_met"]
            else infeasible_winner(self._prepared, self._folder, result, self._advice, self._note)
        )
        return result

    def _quality_notes(self, contenders: Sequence[Contender]) -> list[str]:
        """What the measured values leave open of the limits on the quality."""
        measured = [(c.metrics or {}).get("quality") for c in contenders]
        return list(dict.fromkeys(n for q in measured for n in uncertain_limits(self._slo, q)))

    @property
    def proof_has_intervals(self) -> bool:
        """Whether every contender was measured in at least two rounds of the proof."""
        if not self._searched:
            return False
        contenders = [self._searched[0], *self._finalists()]
        return all(sum(t.config == c.config for t in self._proof) >= 2 for c in contenders)

    def _offer_traffic(self) -> None:
        """Find the rate if it is to be measured, and put the windows on disk."""
        if self._prepared.run.get("workload"):
            return
        saturated = None
        if self._options.traffic.rate_is_measured:
            if not self._calibration:
                self._listener.phase("calibration", self._spending.left(), 1)
                offer_traffic(self._folder, self._prepared, saturated=None)
                number = self._trials.next_number
                self._listener.trial_started(number, "all requests at once", {})
                record = self._trials.run("calibration", "calibration", self._prepared.base)
                self._calibration.append(record)
                self._listener.trial_ended(record, None)
            saturated = self._calibration[-1]
        offer_traffic(self._folder, self._prepared, saturated=saturated, final=True)
        for note in self._prepared.notes:
            self._listener.note(note)

    def _finalists(self) -> list[TrialRecord]:
        count = self._options.finalists
        return choose_finalists(self._searched, self._objective, count, self._slo)

    def _prove(self) -> None:
        contenders = [self._searched[0], *self._finalists()]
        rounds = self._options.rounds
        self._listener.phase("proof", self._spending.left(), rounds * len(contenders))
        done = {(t.round, str(t.config)) for t in self._proof}
        for round_ in range(rounds):
            if not any(
                t.round == round_ for t in self._proof
            ) and not self._spending.pays_for_round(round_, len(contenders)):
                self._note(f"the budget paid for {round_} of {rounds} rounds of the proof")
                break
            # Rotated, so that a machine that slows down or warms up favours none of them.
            turn = round_ % len(contenders)
            for contender in contenders[turn:] + contenders[:turn]:
                if (round_, str(contender.config)) in done:
                    continue
                config = EngineConfig.from_mapping(contender.config)
                changes = changed_knobs(self._prepared.base.to_dict(), contender.config)
                source = f"proof of trial {contender.number}"
                self._listener.trial_started(
                    self._trials.next_number, source, {n: c[1] for n, c in changes.items()}
                )
                window = self._prepared.proof_window(round_)
                record = self._trials.run(
                    *("proof", source, config, window, round_),
                    predicted=self._exploration.predicted(self._guide, config, window),
                )
                self._proof.append(record)
                self._listener.trial_ended(record, self._exploration.best())

    def _note(self, text: str) -> None:
        if text not in self._prepared.notes:
            self._prepared.notes.append(text)
            self._listener.note(text)
