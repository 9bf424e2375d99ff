"""`autotune doctor --tune-kernels`: words, exit codes and what is left for the next time."""

import io
import json
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from autotune import kernel_tuning
from autotune.cli.doctor_tuning import TuningProgress
from autotune.cli.main import app
from autotune.kernel_tuning import KernelTuning


def row(seconds: float, default: float) -> dict[str, Any]:
    return {
        "quantization": "int4",
        "kernel": "int4_linear[x]",
        "sizes": [16, 4096, 14336],
        "dtypes": ["bf16"],
        "path": "triton",
        "tiles": {"block_m": 16, "num_warps": 4},
        "seconds": seconds,
        "default_seconds": default,
        "refused": 0,
    }


def tuned(
    monkeypatch: pytest.MonkeyPatch, *arguments: str, **found: Any
) -> tuple[Result, list[Any]]:
    asked: list[Any] = []

    def tune_kernels(model: str, budget_s: float, listener: Any, should_stop: Any) -> KernelTuning:
        asked.append((model, budget_s, should_stop()))
        listener("quantization none", 0, 0, "loading the model")
        listener("quantization none", 1, 9, "qkv, 1 row")
        return KernelTuning("tiny", "Some GPU", "/cache/some.json", **found)

    monkeypatch.setattr(kernel_tuning, "tune_kernels", tune_kernels)
    arguments = ("doctor", "--tune-kernels", *arguments)
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "100"}), asked


def test_what_was_gained_and_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    results = [row(10e-6, 25e-6), row(3e-6, 3e-6)]
    result, asked = tuned(
        monkeypatch, "--model", "m", "--budget", "90s", results=results, known=4, left=["fp8: 7"]
    )
    assert result.exit_code == 0
    assert asked == [("m", 90.0, False)]
    assert result.stderr == "quantization none: loading the model\n"
    out = " ".join(result.stdout.split())
    assert "2 kernel problems of tiny measured on Some GPU in 0 s, 4 were known; for 1" in out
    assert "int4_linear[x] 16x4096x14336 25.0 10.0 triton block_m=16 num_warps=4" in out
    assert "The budget ended before: fp8: 7. The same command goes on there." in out
    assert "Saved in /cache/some.json" in out


def test_nothing_gained_and_something_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    result, asked = tuned(monkeypatch, failures=["quantization none: head, 1 row: no [memory]"])
    assert result.exit_code == 0
    assert asked == [("", 600.0, False)]
    assert "could not be measured: quantization none: head, 1 row: no [memory]" in result.stdout
    assert "µs" not in result.stdout


def test_json(monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = tuned(monkeypatch, "--json", results=[row(1e-5, 2e-5)])
    found = json.loads(result.stdout)
    assert (found["measured"], found["improved"], found["file"]) == (1, 1, "/cache/some.json")
    assert found["results"][0]["default_seconds"] == 2e-5


def test_without_a_gpu_one_sentence_and_3() -> None:
    result = CliRunner().invoke(app, ["doctor", "--tune-kernels"])
    assert result.exit_code == 3
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "NVIDIA GPU" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "m"], "--model says how kernels are tuned: give --tune-kernels"),
        (["--budget", "5m"], "--budget says how kernels are tuned: give --tune-kernels"),
        (["--tune-kernels", "--budget", "soon"], "--budget 'soon' is not a duration"),
    ],
)
def test_wrong_usage_ends_with_2(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["doctor", *arguments])
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())


def test_interrupted_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def tune_kernels(*_: Any) -> KernelTuning:
        import os
        import signal

        os.kill(os.getpid(), signal.SIGINT)
        return KernelTuning("tiny", "Some GPU", "/cache/some.json", results=[row(1e-5, 2e-5)])

    monkeypatch.setattr(kernel_tuning, "tune_kernels", tune_kernels)
    result = CliRunner().invoke(app, ["doctor", "--tune-kernels"])
    assert result.exit_code == 130
    assert "1 kernel problems" in result.stdout  # what was measured is shown
    assert "The same command goes on where this one ended" in result.stderr


def test_progress_on_a_terminal_and_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    now = iter([0.0, 1.0, 11.0, 12.0])
    monkeypatch.setattr("autotune.cli.doctor_tuning.time.monotonic", lambda: next(now))
    with TuningProgress(Console(file=file, width=80)) as progress:
        for done in range(3):
            progress.show("quantization int8", done, 9, f"qkv, {done} rows [x]")
        progress.show("quantization fp8", 0, 9, "qkv")
    assert file.getvalue().splitlines() == [
        "quantization int8: 0 of 9, qkv, 0 rows [x]",
        "quantization int8: 2 of 9, qkv, 2 rows [x]",
        "quantization fp8: 0 of 9, qkv",
    ]
    terminal = io.StringIO()
    with TuningProgress(Console(file=terminal, width=80, force_terminal=True)) as progress:
        progress.show("quantization int8", 3, 9, "qkv, 8 rows [x]")
        progress._bar.refresh()
    assert "qkv, 8 rows [x]" in terminal.getvalue()
