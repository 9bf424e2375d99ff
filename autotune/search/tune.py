"""The whole search: calibrate, search, prove, decide; resumable at any point."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from autotune.quality_guard import qualities, uncertain_limits
from autotune.records import RunFolder, TrialRecord
from autotune.search.advised import advise_search, infeasible_winner
from autotune.search.configuration import Configuration
from autotune.search.evaluator import Evaluator, TrialEvaluator
from autotune.search.events import Listener, Silent
from autotune.search.explore import Exploration
from autotune.search.forecasting import open_guide
from autotune.search.guide import Guide
from autotune.search.options import TuneOptions
from autotune.search.prepare import Prepared, open_folder, prepare
from autotune.search.probing import Probing
from autotune.search.proof import Contender
from autotune.search.scoreboard import scoreboard
from autotune.search.session import Session
from autotune.search.verdict import result_json
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
            _Search(prepared, folder, evaluator, listener, clock, began, stop).play()
        return prepared.run


class _Search(Session[Prepared]):
    """A search over the bundled engine's knobs."""

    _exploration: Exploration

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
        super().__init__(
            *(prepared, folder, evaluator, listener, clock, began),
            bundled=True,
            earlier_s=prepared.advising_s,
        )
        self._stop = stop
        self._advice: list[dict[str, Any]] = []
        self._guide: Guide | None = None
        self._exploration = Exploration(
            prepared, folder, listener, self._trials, self._spending, self._searched, self._note
        )

    def result(self) -> dict[str, Any] | None:
        """The result as far as the records go; None if not even the default was measured."""
        contenders = self._judged()
        if contenders is None:
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

    def _search(self) -> None:
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

    def _quality_notes(self, contenders: Sequence[Contender]) -> list[str]:
        """What the measured values leave open of the limits on the quality."""
        measured = [(c.metrics or {}).get("quality") for c in contenders]
        return list(dict.fromkeys(n for q in measured for n in uncertain_limits(self._slo, q)))

    def _proof_order(self, contenders: Sequence[TrialRecord], round_: int) -> list[TrialRecord]:
        # Rotated, so that a machine that slows down or warms up favours none of them.
        turn = round_ % len(contenders)
        return [*contenders[turn:], *contenders[:turn]]

    def _config(self, values: Mapping[str, Any]) -> EngineConfig:
        return EngineConfig.from_mapping(values)

    def _foretold(self, config: Configuration, window: int) -> dict[str, Any] | None:
        assert isinstance(config, EngineConfig)
        return self._exploration.predicted(self._guide, config, window)
