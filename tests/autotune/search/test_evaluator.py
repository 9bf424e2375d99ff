"""The search's side of the trial process, against children that misbehave in every way."""

from __future__ import annotations

import dataclasses
import os
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from autotune.errors import EnvironmentMissing, Interrupted
from autotune.records import RunFolder
from autotune.search import evaluator as module
from autotune.search.evaluator import Evaluator
from autotune.search.messages import (
    BrokeGuard,
    Failed,
    MeasureCommand,
    Measured,
    ProbeCommand,
    Probed,
    Progress,
)

CHILD = """
import json, os, signal, sys, time
for line in sys.stdin.buffer:
    command = json.loads(line)
    what = command["config"]["what"]
    if command["message"] == "ProbeCommand" and what == "answer":
        os.write(1, json.dumps({"message": "Probed", "ceilings": {"pid": os.getpid()},
                                "probes": {}}).encode() + b"\\n")
        continue
    def reply(**body):
        os.write(1, json.dumps(body).encode() + b"\\n")
    reply(message="Progress", phase="load", finished=1, total=2)
    if what == "answer":
        reply(message="Measured", metrics={"pid": os.getpid()})
    elif what == "segfault":
        print("boom: segmentation", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    elif what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "exit":
        print("boom: exit", file=sys.stderr, flush=True)
        sys.exit(7)
    elif what == "lacking":
        reply(message="Lacking", reason="no space is left")
    elif what == "broke":
        reply(message="BrokeGuard", quality={"kl": 0.5})
    elif what == "quantize":
        for layer in range(12):
            reply(message="Progress", phase="quantizing", finished=layer, total=12)
            time.sleep(0.1)
        reply(message="Measured", metrics={})
    elif what == "hang":
        time.sleep(60)
"""


@pytest.fixture
def child(tmp_path: Path) -> tuple[str, ...]:
    script = tmp_path / "child.py"
    script.write_text(textwrap.dedent(CHILD))
    return (sys.executable, str(script))


def command(what: str) -> MeasureCommand:
    return MeasureCommand(
        trial=0,
        config={"what": what},
        window=0,
        rate_factor=1.0,
        drain_limit=1.0,
        seed=0,
        slo="ttft<1s",
    )


def test_a_broken_guard_is_an_answer(tmp_path: Path, child: tuple[str, ...]) -> None:
    with Evaluator(RunFolder(tmp_path), threading.Event(), None, child) as evaluator:
        assert ask(evaluator, "broke") == BrokeGuard({"kl": 0.5})


def test_quantizing_is_no_hang_while_it_gets_on(
    tmp_path: Path, child: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Longer than what a trial may take without a word: Python alone starts in a tenth of that.
    monkeypatch.setattr(module, "OVERHEAD_LIMIT_S", 0.9)
    with Evaluator(RunFolder(tmp_path), threading.Event(), None, child) as evaluator:
        assert evaluator.measure(command("quantize"), time_limit=0.0) == Measured({})


def test_quantizing_ends_with_the_time_that_the_budget_leaves_for_it(
    tmp_path: Path, child: tuple[str, ...]
) -> None:
    limited = dataclasses.replace(command("quantize"), quantize_limit=0.3)
    limited.config["quantization"] = "gptq"
    with Evaluator(RunFolder(tmp_path), threading.Event(), None, child) as evaluator:
        began = time.monotonic()
        failed = evaluator.measure(limited, time_limit=60.0)
        assert time.monotonic() - began < 30.0
    assert isinstance(failed, Failed)
    assert failed.kind == "timeout"
    assert "autotune quantize --method gptq" in failed.reason


def ask(evaluator: Evaluator, what: str) -> Measured | Failed:
    return evaluator.measure(command(what), time_limit=5.0)


def test_probes_are_taken_by_the_child_that_holds_the_model(
    tmp_path: Path, child: tuple[str, ...]
) -> None:
    with Evaluator(RunFolder(tmp_path), threading.Event(), None, child) as evaluator:
        measured = ask(evaluator, "answer")
        probed = evaluator.probe(ProbeCommand({"what": "answer"}, ["none"], ["auto"], 1.0))
        assert isinstance(measured, Measured)
        assert probed == Probed(measured.metrics, {})
        # A crash there is the end of the probes, and not of the search.
        crashed = evaluator.probe(ProbeCommand({"what": "segfault"}, ["none"], ["auto"], 1.0))
        assert isinstance(crashed, Failed)
        assert "SIGSEGV" in crashed.reason
        assert isinstance(ask(evaluator, "answer"), Measured)


def test_probes_that_hang_end_with_their_time(
    tmp_path: Path, child: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "OVERHEAD_LIMIT_S", 1.0)
    with Evaluator(RunFolder(tmp_path), threading.Event(), None, child) as evaluator:
        failed = evaluator.probe(ProbeCommand({"what": "hang"}, ["none"], ["auto"], 0.1))
    assert isinstance(failed, Failed)
    assert failed.kind == "timeout"


def test_child_is_kept_between_measurements_and_reports_progress(
    tmp_path: Path, child: tuple[str, ...]
) -> None:
    seen: list[Progress] = []
    with Evaluator(RunFolder(tmp_path), threading.Event(), seen.append, child) as evaluator:
        first, second = ask(evaluator, "answer"), ask(evaluator, "answer")
    assert isinstance(first, Measured)
    assert first == second
    assert seen == [Progress("load", 1, 2)] * 2


@pytest.mark.parametrize(
    ("what", "kind", "reason"),
    [
        ("segfault", "crash", "SIGSEGV: boom: segmentation"),
        ("killed", "out_of_memory", "killed"),
        ("exit", "crash", "exit code 7: boom: exit"),
    ],
)
def test_death_is_an_answer_and_the_next_trial_gets_a_new_child(
    tmp_path: Path, child: tuple[str, ...], what: str, kind: str, reason: str
) -> None:
    with Evaluator(RunFolder(tmp_path), threading.Event(), None, child) as evaluator:
        before = ask(evaluator, "answer")
        failed = ask(evaluator, what)
        after = ask(evaluator, "answer")
    assert isinstance(failed, Failed)
    assert failed.kind == kind
    assert reason in failed.reason
    assert isinstance(before, Measured)
    assert isinstance(after, Measured)
    assert before.metrics["pid"] != after.metrics["pid"]


def test_many_crashes_after_an_answer_do_not_end_the_run(
    tmp_path: Path, child: tuple[str, ...]
) -> None:
    with Evaluator(RunFolder(tmp_path), threading.Event(), None, child) as evaluator:
        ask(evaluator, "answer")
        for _ in range(5):
            assert isinstance(ask(evaluator, "exit"), Failed)


def test_child_that_never_answers_is_the_environments_fault(
    tmp_path: Path, child: tuple[str, ...]
) -> None:
    with Evaluator(RunFolder(tmp_path), threading.Event(), None, child) as evaluator:
        ask(evaluator, "exit")
        ask(evaluator, "exit")
        with pytest.raises(EnvironmentMissing, match="boom: exit"):
            ask(evaluator, "exit")


def test_what_the_child_lacks_ends_the_run_and_says_how_to_go_on(
    tmp_path: Path, child: tuple[str, ...]
) -> None:
    with (
        Evaluator(RunFolder(tmp_path), threading.Event(), None, child) as evaluator,
        pytest.raises(EnvironmentMissing, match=r"no space is left.*--resume"),
    ):
        ask(evaluator, "lacking")


def test_hang_ends_in_a_timeout(
    tmp_path: Path, child: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "OVERHEAD_LIMIT_S", 0.5)
    with Evaluator(RunFolder(tmp_path), threading.Event(), None, child) as evaluator:
        failed = evaluator.measure(command("hang"), time_limit=0.5)
    assert isinstance(failed, Failed)
    assert failed.kind == "timeout"


def test_stop_interrupts_a_measurement_and_ends_the_child(
    tmp_path: Path, child: tuple[str, ...]
) -> None:
    stop = threading.Event()
    with Evaluator(RunFolder(tmp_path), stop, None, child) as evaluator:
        measured = ask(evaluator, "answer")
        assert isinstance(measured, Measured)
        threading.Timer(0.3, stop.set).start()
        began = time.monotonic()
        with pytest.raises(Interrupted):
            evaluator.measure(command("hang"), time_limit=60.0)
        assert time.monotonic() - began < 10
    with pytest.raises(ProcessLookupError):
        os.kill(measured.metrics["pid"], 0)
