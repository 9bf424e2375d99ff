"""The GPU check without a GPU: a rehearsal of what it measures, and its refusal."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import check, compile_ahead
from benchmarks.gpu.results import Row
from benchmarks.gpu.timing import Bench, Timing
from kernels.triton import runtime

ROOT = Path(__file__).parents[1]
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@needs_no_gpu
def test_a_rehearsal_runs_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu import attention, engine
    from tests.kernels.triton.interpreter import repaired

    monkeypatch.setattr(attention, "CACHE_DTYPES", {"int8": torch.int8})
    monkeypatch.setattr(engine, "METHODS", ("int4",))
    with repaired(), runtime.interpreting():
        status = check.check(torch.device("cpu"), tmp_path, 300.0, rehearsal=True)
    parts = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("rehearsal/*.json")}
    assert parts["targets"]["failures"] == {}
    assert status == 0
    assert set(parts) == {"attention", "linears", "elementwise", "engine", "targets"}
    rows = [row for name in ("attention", "linears") for row in parts[name]["rows"]]
    assert len(rows) >= 14
    for row in rows:
        assert 0.0 < row["error"] <= row["allowed_error"], row["name"]
    names = [row["name"] for row in parts["engine"]["rows"]]
    assert names == ["prefill step", "decode step, int4"]
    assert parts["engine"]["against_transformers"]["ratio"] > 0


def test_a_result_that_is_no_number_is_wrong() -> None:
    timing = Timing(1.0, 1.0, 1.0, 1, True)
    assert Row("a", {}, timing, error=1e-3, allowed=1e-2).is_right
    assert not Row("a", {}, timing, error=float("nan"), allowed=1e-2).is_right


@needs_no_gpu
def test_without_a_gpu_there_is_one_sentence() -> None:
    script = ROOT / "scripts" / "gpu_check.sh"
    found = subprocess.run(
        [str(script)],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (found.returncode, found.stdout) == (3, "")
    assert found.stderr.startswith("No check: ")
    assert found.stderr.count("\n") == 1


def test_parts_compile_side_by_side_and_no_longer_than_allowed(tmp_path: Path) -> None:
    code = "import sys, time; open(sys.argv[1], 'w').close(); time.sleep(60 * ('b' in sys.argv[1]))"
    files = [tmp_path / "a", tmp_path / "b0", tmp_path / "b1"]
    began = time.monotonic()
    compile_ahead.compile_side_by_side(
        [path.name for path in files],
        2.0,
        (
            sys.executable,
            "-c",
            code.replace("sys.argv[1]", f"{str(tmp_path)!r} + '/' + sys.argv[1]"),
        ),
    )
    assert time.monotonic() - began < 30.0
    assert [path.exists() for path in files] == [True] * 3


def test_what_there_is_no_time_for_is_left_out_and_no_failure(
    capsys: pytest.CaptureFixture[str],
) -> None:
    failures: dict[str, str] = {}
    for deadline in (0.0, time.monotonic() + 60):
        bench = Bench(torch.device("cpu"), True, deadline)
        check._attempt("engine", lambda: print("ran"), bench, failures)
    assert capsys.readouterr().out == "engine: no time is left for it\nran\n"
    assert not failures


def test_what_is_compiled_ahead_is_what_is_measured() -> None:
    names = set(compile_ahead.work())
    assert {"engine int4", "linears fp8", "decodes", "prefills", "elementwise"} <= names
    bench = Bench(torch.device("cpu"), False, 0.0, compiling=True)
    runs: list[int] = []
    bench.time([lambda: runs.append(0), lambda: runs.append(1), lambda: runs.append(2)])
    assert bench.copies(1) == 1
    assert runs == [0]
