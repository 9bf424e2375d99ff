"""Processes of ranks as the driver sees them: small scripts here, which need no model."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from engine import parallel, parallel_processes
from engine.errors import ConfigError, EngineError, EnvironmentLacks, ModelError
from engine.packed_step import StepHeader
from engine.parallel import GroupRanks, leave
from engine.parallel_driver import DriverRanks
from engine.parallel_messages import command_bytes, error_line, loaded_line, read_answer
from engine.parallel_processes import LOST, WorkerProcesses

# What a rank does: keyed by rank, after it has said that it is loaded.
SCRIPT = """
import json, os, signal, sys, time
arguments = json.loads(sys.argv[1])
print('{"loaded": true}', flush=True)
exec(arguments["acts"][str(arguments["rank"])])
"""
READ = "sys.stdin.read()"
Start = Callable[..., tuple[WorkerProcesses, threading.Event]]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[WorkerProcesses] = []

    def begin(*acts: str) -> tuple[WorkerProcesses, threading.Event]:
        failed = threading.Event()
        workers = WorkerProcesses(len(acts) + 1, failed.set, (sys.executable, "-c", SCRIPT))
        started.append(workers)
        workers.start({"acts": dict(enumerate(acts, 1))})
        return workers, failed

    yield begin
    for workers in started:
        workers.close()


def failure(workers: WorkerProcesses, failed: threading.Event) -> str:
    assert failed.wait(20.0)
    with pytest.raises(EngineError) as caught:
        workers.check()
    return str(caught.value)


def test_whoever_ends_is_named_with_how(start: Start) -> None:
    for act, how in (
        ("sys.exit(7)", "ended with exit status 7"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "was killed by SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL, perhaps for want of"),
    ):
        workers, failed = start(READ, act)
        told = failure(workers, failed)
        assert told.startswith(f"rank 2 of 3 (process {workers.pids()[2]}) {how}")
        assert told.endswith(": load the model again")


def test_the_cause_is_named_and_not_who_lost_it(start: Start) -> None:
    dies = "time.sleep(0.4); os.kill(os.getpid(), signal.SIGKILL)"
    workers, failed = start(f"sys.exit({LOST})", dies, READ)
    assert failure(workers, failed).startswith("rank 2 of 4")


def test_an_error_is_told_before_the_end(start: Start) -> None:
    error = json.dumps({"error": "EnvironmentLacks", "message": "rank 1 of 2: no memory"})
    workers, failed = start(f"print({error!r}, flush=True); sys.exit(1)")
    assert failure(workers, failed) == "rank 1 of 2: no memory"
    with pytest.raises(EnvironmentLacks):
        workers.send(b"")


def test_sending_to_one_that_is_gone_tells_why(start: Start) -> None:
    workers, _ = start("sys.exit(5)")
    message = command_bytes("score", {"text": "x" * 100_000})

    def send() -> None:
        for _ in range(100):
            workers.send(message)

    with pytest.raises(EngineError, match=r"rank 1 of 2 .*exit status 5"):
        send()


def test_closing_ends_all_and_those_that_do_not_listen(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel_processes, "_PATIENCE", 0.3)
    workers, failed = start(READ, "time.sleep(60)")
    workers.wait_until_loaded()
    began = time.monotonic()
    workers.close()
    assert time.monotonic() - began < 10.0
    assert not failed.is_set()
    with pytest.raises(EngineError, match="the model was closed"):
        workers.check()


def driver() -> tuple[DriverRanks, subprocess.Popen[bytes]]:
    """A driver of one rank that only reads."""
    ranks = DriverRanks(2, torch.device("cpu"))
    ranks.workers._command = (sys.executable, "-c", SCRIPT)
    ranks.start(acts={1: READ})
    return ranks, ranks.workers._processes[1]


def test_a_driver_that_fails_in_a_step_leaves_nobody_waiting() -> None:
    ranks, process = driver()
    with pytest.raises(ValueError, match="an odd number"), ranks.lockstep():
        raise ValueError("an odd number")
    process.wait(20.0)
    with pytest.raises(
        EngineError, match=r"rank 0 of 2 failed in a step \(ValueError: an odd number\)"
    ):
        ranks.step(StepHeader(1, 1, 1, 1, 1, 1, 1), torch.zeros(1, dtype=torch.int64))
    ranks.close()


def test_ranks_end_with_the_model_that_is_forgotten() -> None:
    ranks, process = driver()
    folder = ranks._folder
    assert process.poll() is None
    del ranks
    gc.collect()
    process.wait(20.0)
    assert not folder.exists()


class HeldGroup:
    """Aborts as NCCL does while a captured graph is alive: in the end not at all."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.let_go = threading.Event()

    def abort(self) -> None:
        self.asked.set()
        assert self.let_go.wait(30.0)


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldGroup]:
    monkeypatch.setattr(parallel, "LEAVING", 0.05)
    held = HeldGroup()
    yield held
    held.let_go.set()


def test_graphs_that_hold_the_group_do_not_keep_a_rank_from_leaving(group: HeldGroup) -> None:
    leave(group)
    assert group.asked.is_set()


def test_who_has_the_graphs_can_end_the_waiting(group: HeldGroup) -> None:
    ranks = GroupRanks(0, 2, torch.device("cpu"))
    ranks._group = group
    ranks.abort()
    assert group.asked.is_set()


def test_a_group_outlives_a_process_that_starts_no_more_threads(
    group: HeldGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    before = sys.getrefcount(group)
    leave(group)
    assert sys.getrefcount(group) == before + 1  # its destructor never runs
    assert not group.asked.is_set()


@pytest.mark.parametrize("kind", [ConfigError, ModelError, EnvironmentLacks, EngineError])
def test_errors_keep_their_kind(kind: type[EngineError]) -> None:
    read = read_answer(error_line(kind("ä\nsentence"), "rank 1: ä\nsentence"))
    assert type(read) is kind
    assert str(read) == "rank 1: ä\nsentence"
    assert type(read_answer(error_line(RuntimeError("x"), "y"))) is EngineError
    assert read_answer(loaded_line()) is None
