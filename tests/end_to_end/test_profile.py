"""Profiling as a user does: a load, Ctrl-C in the middle of it, and its records read again."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from autotune import profile_run
from autotune.profiling.file import read_profile
from autotune.records import RunFolder
from tests.end_to_end.conftest import ENTRY, ENVIRONMENT, Autotune

# A cache of its default size takes longer to clear than these loads take.
SMALL = ("--kv-cache-memory-bytes", str(1 << 26))
LOAD = ("profile", "--device", "cpu", "--rate", "8", "--scale-lengths", "0.05", *SMALL)


def test_profile_of_a_trace_is_written_and_read_again(
    tmp_path: Path, in_process: Autotune, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile_run, "CALIBRATION_BUDGET_S", 0.5)
    trace = tmp_path / "trace.csv"
    rows = [f"2024-05-10 00:00:00.{40000 * i:06},{40 + i},8" for i in range(25)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows, ""]))
    done = in_process(
        *("profile", "--device", "cpu", "--workload", str(trace), "--duration", "1s"),
        *("--slo", "ttft<2s", "--trace", "--trace-steps", "1:3", "-o", "out", "--json"),
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["traffic"]["requests"] == 25
    assert answer["probes"]["linears"]
    path = tmp_path / "out"
    assert {p.name for p in path.iterdir()} == {
        *("run.json", "profile.json", "diagnosis.json", "requests.parquet", "steps.parquet"),
        *("workload.parquet", "trace.json", "report.html"),
    }
    assert json.loads((path / "trace.json").read_text())["traceEvents"]
    assert "Report: out/report.html" in done.stderr

    again = in_process("profile", "--from", "out", "--slo", "ttft<1ms")
    assert again.returncode == 0, again.stderr
    assert "ttft<1ms binds: missed" in again.stdout
    assert read_profile(path).slo != "ttft<1ms"


def test_interrupt_keeps_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "out"
    process = subprocess.Popen(
        [*ENTRY, *LOAD, "--duration", "60s", "-o", str(path)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        while (line := process.stderr.readline()) and "measuring" not in line:
            pass
        assert line, "the load never began"
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        shown, messages = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, messages
    assert "Stopping; what was measured is kept" in messages
    assert "the load was interrupted" in shown
    assert RunFolder(path).read_run()["status"] == "interrupted"
    assert read_profile(path).traffic.requests < 480
    assert (path / "report.html").exists()
