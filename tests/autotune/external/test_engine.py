"""Finding an engine's program, its version, and what of the table its release has."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil
import pytest

from autotune.errors import BadInput, EnvironmentMissing
from autotune.external import engine as engine_module
from autotune.external.engine import find_engine, without_missing_flags
from autotune.external.launch import launch
from tests.autotune.external.fake_vllm import install


def script(path: Path, *lines: str) -> Path:
    """A program that runs these lines of shell."""
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


def test_finding_an_engine(tmp_path: Path) -> None:
    program = install(tmp_path)
    (tmp_path / "weights").mkdir()
    engine = find_engine(
        "vllm", str(tmp_path / "weights"), program=str(program), fixed={"max_model_len": 512}
    )
    assert (engine.version, engine.device) == ("0.32.0", "cpu")
    assert engine.version_note() is None
    assert engine.served_name == "weights"
    assert engine.program == (str(program), "serve")
    with pytest.raises(EnvironmentMissing, match="was not found"):
        find_engine("vllm", "m", program=str(tmp_path / "none"))
    with pytest.raises(BadInput, match="max_num_seqs: 0 is below 1"):
        find_engine("vllm", "m", program=str(program), fixed={"max_num_seqs": 0})
    with pytest.raises(BadInput, match="no engine 'vlm'"):
        find_engine("vlm", "m")


def test_a_release_that_the_table_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", '{"version": "9.1.0"}')
    engine = find_engine("vllm", "m", program=str(install(tmp_path)), device="cpu")
    assert not engine.version_checked
    note = engine.version_note()
    assert note is not None
    assert note.startswith("vLLM 9.1.0 is none of the releases")
    # The fake's help lists fewer flags than vLLM's.
    assert engine.missing is not None
    assert "stream_interval" in engine.missing
    assert "stream_interval" in note
    assert "max_num_seqs" in engine.table.knobs
    assert not set(engine.missing) & set(engine.table.knobs)
    assert without_missing_flags(engine) == engine
    with launch(engine, {"max_num_seqs": 2}, log_file=tmp_path / "log") as server:
        assert server.healthy()


def test_a_release_that_does_not_list_its_flags(tmp_path: Path) -> None:
    engine = find_engine(
        "vllm", "m", program=str(script(tmp_path / "vllm", "echo 9.9.9")), device="cpu"
    )
    assert engine.missing is None
    note = engine.version_note()
    assert note is not None
    assert "does not list its own" in note


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (("echo ImportError: libcudart.so.13 is not there >&2; exit 1",), "ImportError: libcudart"),
        (("exit 3",), "exit status 3"),
    ],
)
def test_a_program_that_is_broken(tmp_path: Path, lines: tuple[str, ...], said: str) -> None:
    with pytest.raises(EnvironmentMissing, match="does not tell the version of vLLM") as caught:
        find_engine("vllm", "m", program=str(script(tmp_path / "vllm", *lines)))
    assert said in str(caught.value)


def test_a_python_without_the_engine() -> None:
    with pytest.raises(EnvironmentMissing, match="No package metadata was found for sglang"):
        find_engine("sglang", "m", program=sys.executable)


def test_a_program_that_hangs_is_ended_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = tmp_path / "pids"
    hangs = script(
        tmp_path / "vllm", f"sleep 300 & echo $! > {pids}.new", f"mv {pids}.new {pids}", "wait"
    )
    monkeypatch.setattr(engine_module, "_ASK_LIMIT_S", 0.5)
    with pytest.raises(EnvironmentMissing, match=r"did not end in 0\.5 s"):
        find_engine("vllm", "m", program=str(hangs))
    pid = int(pids.read_text())
    until = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--max-num-seqs", "--search max_num_seqs=VALUE"),
        ("--max_num_seqs=8", "--search max_num_seqs=VALUE"),
        ("--no-enable-prefix-caching", "--search enable_prefix_caching=VALUE"),
        ("--speculative-config", "--search speculative_method=VALUE"),
        ("--port=9", "--port is given at every start already"),
        ("--served-model-name", "given at every start already"),
    ],
)
def test_arguments_that_would_hold_for_every_trial_are_refused(
    tmp_path: Path, word: str, said: str
) -> None:
    program = str(install(tmp_path))
    with pytest.raises(BadInput, match=said):
        find_engine("vllm", "m", program=program, extra_arguments=("--trust-remote-code", word))
    found = find_engine("vllm", "m", program=program, extra_arguments=("--trust-remote-code", "8"))
    assert found.extra_arguments == ("--trust-remote-code", "8")
