"""The whole search over another engine's flags: calibrate, search, prove, decide; resumable."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from autotune.external_search.evaluator import ExternalEvaluator
from autotune.external_search.explore import ExternalExploration
from autotune.external_search.options import ExternalOptions
from autotune.external_search.prepare import PreparedExternal, prepare_external
from autotune.external_search.served import Server, starter
from autotune.external_search.space import FlagConfig
from autotune.load.discover import discover
from autotune.load.endpoint import Endpoint
from autotune.records import RunFolder, TrialRecord
from autotune.search.evaluator import TrialEvaluator
from autotune.search.events import Listener, Silent
from autotune.search.messages import Progress
from autotune.search.prepare import open_folder
from autotune.search.session import Session
from autotune.search.verdict import result_json
from engine.tokenizer import has_tokenizer, load_tokenizer


def tune_external(
    options: ExternalOptions | None,
    path: Path,
    *,
    command: Sequence[str] = (),
    stop: threading.Event | None = None,
    listener: Listener | None = None,
    evaluator: TrialEvaluator | None = None,
    clock: Callable[[], float] | None = None,
) -> dict[str, Any]:
    """Tune another engine's flags for a workload and an SLO; returns the content of `run.json`.

    Args:
        options: what to do; None resumes the run in `path`.
        path: the run folder; it must not exist, or be empty, unless a run is resumed.
        command: the command line, for the record.
        stop: set it to stop cleanly; what was measured is kept.
        listener: told of progress.
        evaluator: measures in place of servers that are started.
        clock: seconds, for the budget; `time.monotonic` without it.

    Raises:
        BadInput: options that make no sense, or a folder that cannot be used.
        EnvironmentMissing: no disk space, no such program, or a server that would fail whatever
            its flags.
        Interrupted: `stop` was set; `run.json` says so and the run can be resumed.
    """
    clock = clock or time.monotonic
    began = clock()
    listener = listener or Silent()
    stop = stop or threading.Event()
    with open_folder(path, resume=options is None) as folder:
        prepared = prepare_external(folder, options, command)
        if prepared.run["status"] == "done":
            listener.note(f"{path} is finished; nothing is measured again")
            return prepared.run
        with contextlib.ExitStack() as stack:
            servers = None
            if evaluator is None:
                servers = evaluator = stack.enter_context(
                    _servers(folder, prepared, stop, listener.progress)
                )
            _Search(prepared, folder, evaluator, servers, listener, clock, began).play()
        return prepared.run


def _servers(
    folder: RunFolder,
    prepared: PreparedExternal,
    stop: threading.Event,
    on_progress: Callable[[Progress], None],
) -> ExternalEvaluator:
    options = prepared.options
    shape = options.shape_folder
    key = prepared.engine.api_key
    tokenizer = load_tokenizer(shape) if has_tokenizer(shape) else None

    def agree(server: Server) -> Endpoint:
        found = discover(
            server.url, model=server.model, api_key=key, tokenizer=tokenizer, stop=stop
        )
        prepared.notes += [note for note in found.notes if note not in prepared.notes]
        return found.endpoint

    return ExternalEvaluator(
        folder,
        prepared.engine,
        starter(prepared.engine, folder.path),
        options.parsed_objective,
        stop,
        on_progress,
        api_key=key,
        tokenizer=tokenizer,
        agree=agree,
    )


class _Search(Session[PreparedExternal]):
    """A search over another engine's flags."""

    _exploration: ExternalExploration

    def __init__(
        self,
        prepared: PreparedExternal,
        folder: RunFolder,
        evaluator: TrialEvaluator,
        servers: ExternalEvaluator | None,
        listener: Listener,
        clock: Callable[[], float],
        began: float,
    ) -> None:
        super().__init__(prepared, folder, evaluator, listener, clock, began, bundled=False)
        self._exploration = ExternalExploration(
            prepared, folder, listener, self._trials, self._spending, self._searched, self._note
        )
        self._exploration.evaluator = servers

    def result(self) -> dict[str, Any] | None:
        """The result as far as the records go; None if nothing could be measured."""
        contenders = self._judged()
        if contenders is None:
            return None
        unit = self._objective.unit(self._slo)
        importances = self._exploration.importances()
        return result_json(contenders, self._objective, unit, importances, self._prepared.notes)

    def _search(self) -> None:
        self._exploration.measure_default()
        if not self._proof:
            self._exploration.explore()

    def _prove(self) -> None:
        if len(self._contenders()) == 1:
            self._note("no other configuration ran, so that there is nothing to prove")
        super()._prove()

    def _proof_order(self, contenders: Sequence[TrialRecord], round_: int) -> list[TrialRecord]:
        # There and back again: who ends a round begins the next, and its server goes on. Each goes
        # first as often as last, so that a machine that slows down or warms up favours none, and of
        # n contenders in r rounds r - 1 starts are spared.
        return list(contenders) if round_ % 2 == 0 else list(reversed(contenders))

    def _config(self, values: Mapping[str, Any]) -> FlagConfig:
        return FlagConfig(values)
