"""The whole search over another engine's flags: calibrate, search, prove, decide; resumable."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from autotune.errors import Interrupted
from autotune.external_search.evaluator import ExternalEvaluator, api_key_of
from autotune.external_search.explore import ExternalExploration
from autotune.external_search.options import ExternalOptions
from autotune.external_search.prepare import PreparedExternal, prepare_external
from autotune.external_search.proof_order import proof_order
from autotune.external_search.served import Server, starter
from autotune.external_search.space import FlagConfig
from autotune.load.discover import discover
from autotune.load.endpoint import Endpoint
from autotune.records import RunFolder, TrialRecord
from autotune.search.evaluator import TrialEvaluator
from autotune.search.events import Listener, Silent
from autotune.search.messages import Progress
from autotune.search.prepare import conclude, offer_traffic, open_folder
from autotune.search.proof import choose_finalists, judge
from autotune.search.spending import Spending
from autotune.search.trials import TrialRunner
from autotune.search.verdict import changed_knobs, result_json
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
            search = _Search(prepared, folder, evaluator, servers, listener, clock, began)
            try:
                search.go()
            except Interrupted:
                # Before the proof there is a best trial, which the records tell, but no result.
                result = search.result() if search.proof_has_intervals else None
                conclude(folder, prepared.run, "interrupted", result)
                raise
        conclude(folder, prepared.run, "done", search.result())
        return prepared.run


def _servers(
    folder: RunFolder,
    prepared: PreparedExternal,
    stop: threading.Event,
    on_progress: Callable[[Progress], None],
) -> ExternalEvaluator:
    options = prepared.options
    shape = options.shape_folder
    key = api_key_of(options.api_key_env)
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


class _Spending(Spending):
    """Every trial starts a server, so that the first is as typical as the others."""

    def trial_s(self) -> float:
        """What a trial takes; before one is known, what the schedule expects."""
        known = [t.seconds for t in (*self._searched, *self._proof) if t.outcome == "ok"]
        return sorted(known)[len(known) // 2] if known else self._schedule.trial_s


class _Search:
    """One run under way, which this process began to work on when `clock` said `began`."""

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
        self._prepared = prepared
        self._options = prepared.options
        self._folder = folder
        self._listener = listener
        self._slo = prepared.options.parsed_slo
        self._objective = prepared.options.parsed_objective
        earlier = folder.read_trials()
        self._calibration = [t for t in earlier if t.kind == "calibration"]
        self._searched = [t for t in earlier if t.kind == "search"]
        self._proof = [t for t in earlier if t.kind == "proof"]
        self._spending = _Spending(
            prepared.schedule,
            prepared.options.trials,
            lambda: clock() - began,
            sum(t.seconds for t in earlier),
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
            at_once=prepared.options.traffic.rate == math.inf,
            clock=clock,
        )
        self._exploration = ExternalExploration(
            prepared,
            folder,
            listener,
            self._trials,
            servers,
            self._spending,
            self._searched,
            self._note,
        )

    def go(self) -> None:
        """Measure all that is not on disk yet."""
        self._offer_traffic()
        self._exploration.measure_default()
        if not self._proof:
            self._exploration.explore()
        self._prove()
        self._listener.phase("done", None, None)

    def result(self) -> dict[str, Any] | None:
        """The result as far as the records go; None if nothing could be measured."""
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
            bundled=False,
        )
        if all(c.metrics is None for c in contenders):
            return None
        unit = self._objective.unit(self._slo)
        importances = self._exploration.importances()
        return result_json(contenders, self._objective, unit, importances, self._prepared.notes)

    @property
    def proof_has_intervals(self) -> bool:
        """Whether every contender was measured in at least two rounds of the proof."""
        if not self._searched:
            return False
        contenders = [self._searched[0], *self._finalists()]
        return all(sum(t.config == c.config for t in self._proof) >= 2 for c in contenders)

    def _offer_traffic(self) -> None:
        """Find the rate if it is to be measured, and put the windows on disk."""
        prepared = self._prepared
        if prepared.run.get("workload"):
            return
        for note in prepared.notes:
            self._listener.note(note)
        told = len(prepared.notes)
        saturated = None
        if self._options.traffic.rate_is_measured:
            if not self._calibration:
                self._listener.phase("calibration", self._spending.left(), 1)
                offer_traffic(self._folder, prepared, saturated=None)
                number = self._trials.next_number
                self._listener.trial_started(number, "all requests at once", {})
                record = self._trials.run("calibration", "calibration", prepared.base)
                self._calibration.append(record)
                self._listener.trial_ended(record, None)
            saturated = self._calibration[-1]
        offer_traffic(self._folder, prepared, saturated=saturated, final=True)
        for note in prepared.notes[told:]:
            self._listener.note(note)

    def _finalists(self) -> list[TrialRecord]:
        count = self._options.finalists
        return choose_finalists(self._searched, self._objective, count, self._slo)

    def _prove(self) -> None:
        contenders = [self._searched[0], *self._finalists()]
        if len(contenders) == 1:
            self._note("no other configuration ran, so that there is nothing to prove")
        rounds = self._options.rounds
        self._listener.phase("proof", self._spending.left(), rounds * len(contenders))
        done = {(t.round, str(t.config)) for t in self._proof}
        for round_ in range(rounds):
            begun = any(t.round == round_ for t in self._proof)
            if not begun and not self._spending.pays_for_round(round_, len(contenders)):
                self._note(f"the budget paid for {round_} of {rounds} rounds of the proof")
                break
            for contender in proof_order(contenders, round_):
                if (round_, str(contender.config)) in done:
                    continue
                self._prove_once(contender, round_)

    def _prove_once(self, contender: TrialRecord, round_: int) -> None:
        config = FlagConfig(contender.config)
        changes = _changes(self._prepared.base.to_dict(), contender.config)
        source = f"proof of trial {contender.number}"
        self._listener.trial_started(self._trials.next_number, source, changes)
        window = self._prepared.proof_window(round_)
        record = self._trials.run("proof", source, config, window, round_)
        self._proof.append(record)
        self._listener.trial_ended(record, self._exploration.best())

    def _note(self, text: str) -> None:
        if text not in self._prepared.notes:
            self._prepared.notes.append(text)
            self._listener.note(text)


def _changes(default: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: pair[1] for name, pair in changed_knobs(default, config).items()}
