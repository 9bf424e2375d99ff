"""`autotune run --engine`, against a program that takes vLLM's flags."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from autotune.embedded import TARGET
from autotune.records import RunFolder
from tests.autotune.external.fake_vllm import install
from tests.end_to_end.conftest import ENTRY, ENVIRONMENT, Autotune

# A load of a second, so that the whole run takes some.
LOAD = ("--workload", "chat", "--rate", "20", "--duration", "1s", "--scale-lengths", "0.02")
# Starts fail with 4 sequences; with 256 the engine is gone at the first request. With steps of 128
# tokens it answers with garbage.
FAKE = {
    "token_s": 0.002,
    "when": {
        "--max-num-seqs": {"4": "host_memory", "256": "die_on_request"},
        "--max-num-batched-tokens": {"128": "garbage_stream"},
    },
}


def command(vllm: Path, output: Path, *more: str) -> list[str]:
    return [
        *("run", "--engine", "vllm", "--engine-path", str(vllm), "--model", str(TARGET)),
        *(*LOAD, "--slo", "ttft<1s", "-o", str(output), *more),
    ]


def left_behind(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any(str(folder) in word for word in words) and "serve" in words:
            found.append(process)
    return found


def test_another_engine_is_tuned(
    in_process: Autotune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", json.dumps(FAKE))
    output = tmp_path / "run"
    searched = ("--search", "max_num_seqs=4,16,32,64,256", "--sampler", "tpe", "--trials", "6")
    done = in_process(*command(install(tmp_path), output, *searched, "--rounds", "2", "--json"))
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["engine"]["name"] == "vllm"
    assert printed["slo_met"] is True
    assert printed["baseline"]["completed"] > 0
    trials = RunFolder(output).read_trials()
    by_source = {t.source: t for t in trials if t.kind == "search"}
    outcomes = {source: trial.outcome for source, trial in by_source.items()}
    assert outcomes["default"] == "ok"
    assert outcomes["extreme: max_num_seqs=4"] == "out_of_memory"
    assert outcomes["extreme: max_num_seqs=256"] == "out_of_memory"
    garbage = by_source["extreme: max_num_batched_tokens=128"]
    assert garbage.outcome == "crash"
    assert "something else than JSON: '{not json'" in (garbage.reason or "")
    assert (output / "report.html").stat().st_size > 10_000
    assert (output / "deploy" / "serve.sh").exists()
    assert trials[0].metrics is not None
    # What the server's own metrics say.
    assert trials[0].metrics["engine"]["kv_peak_usage"] == 0.25
    assert trials[0].metrics["server"]["facts"]["kv_cache_tokens"] == 93184
    assert left_behind(tmp_path) == []


def test_ctrl_c_ends_the_server_and_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENVIRONMENT, "FAKE_VLLM", json.dumps({"token_s": 0.002}))
    output = tmp_path / "run"
    arguments = command(install(tmp_path), output, "--trials", "2", "--rounds", "2")
    process = subprocess.Popen(
        [*ENTRY, *arguments], cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 60
    while not RunFolder(output).read_trials():
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "--resume" in said
    assert left_behind(tmp_path) == []
    assert RunFolder(output).read_run()["status"] == "interrupted"


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (("--engine", "vllm", "--engine-path", "/no/vllm", "--model", str(TARGET)), "not found", 3),
        (("--lossy",), "--lossy is of a search over another engine", 2),
        (("--engine", "vlm", "--model", str(TARGET)), "known are llamacpp, sglang, vllm", 2),
        (("--engine", "vllm", "--url", "http://h", "--model", str(TARGET)), "belong together", 2),
        (("--engine", "vllm", "--lm-eval-tasks", "x"), "scores the bundled engine", 2),
        (
            ("--engine", "vllm", "--model", str(TARGET), "--api-key-env", "NO_SUCH_VARIABLE"),
            "NO_SUCH_VARIABLE",
            2,
        ),
    ],
)
def test_what_cannot_be_run_is_told_in_a_sentence(
    in_process: Autotune, arguments: tuple[str, ...], said: str, code: int
) -> None:
    done = in_process("run", *arguments, "--trials", "2")
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
