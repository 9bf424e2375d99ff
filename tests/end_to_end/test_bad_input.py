"""Every wrong input gets one clear sentence, its exit code and no traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from autotune.embedded import TARGET
from tests.end_to_end.conftest import Autotune


def broken_model(tmp_path: Path, what: str) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(TARGET, folder)
    match what:
        case "truncated":
            weights = folder / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:100_000])
        case "garbage":
            (folder / "model.safetensors").write_bytes(b"\xff" * 4096)
        case "no weights":
            (folder / "model.safetensors").unlink()
        case "pickle":
            (folder / "model.safetensors").unlink()
            (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
        case "no config":
            (folder / "config.json").unlink()
        case "bad config":
            (folder / "config.json").write_text("{")
        case "architecture":
            config = json.loads((folder / "config.json").read_text())
            config["architectures"] = ["BloomForCausalLM"]
            (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("truncated", "model.safetensors"),
        ("garbage", "model.safetensors"),
        ("no weights", "safetensors"),
        ("pickle", "only as pickles"),
        ("no config", "no config.json"),
        ("bad config", "config.json"),
        ("architecture", "BloomForCausalLM is not supported; supported are LlamaForCausalLM"),
    ],
)
def test_broken_model_folder(tmp_path: Path, in_process: Autotune, what: str, message: str) -> None:
    folder = broken_model(tmp_path, what)
    done = in_process("bench", "--model", str(folder), "--rate", "2", "--duration", "1s")
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_texts_without_a_tokenizer(tmp_path: Path, in_process: Autotune) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TARGET, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    trace = tmp_path / "texts.jsonl"
    trace.write_text('{"prompt": "hello"}\n' * 3)
    done = in_process("bench", "--model", str(folder), "--workload", str(trace), "--rate", "2")
    assert done.returncode == 2, done.stderr
    assert "tokenizer" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "/no/such/folder"), "/no/such/folder"),
        (("--slo", "ttft<200"), "ttft<200"),
        (("--slo", "ttfb<200ms"), "ttfb"),
        (("--workload", "no-such"), "neither a file nor a preset"),
        (("--rate", "fast"), "--rate"),
        (("--rate", "-1"), "--rate"),
        (("--duration", "soon"), "--duration"),
        (("--rate", "2", "--load", "0.5"), "contradict"),
        (("--max-num-seqs", "0"), "max_num_seqs"),
        (("--max-num-seqs", "512", "--max-num-batched-tokens", "64"), "max_num_batched_tokens=64"),
        (("--block-size", "7"), "7"),
        (("--no-such-flag",), "--no-such-flag"),
        (("--max-model-len", "100000"), "max_model_len=100000"),
    ],
)
def test_wrong_options_of_bench(
    in_process: Autotune, arguments: tuple[str, ...], message: str
) -> None:
    done = in_process("bench", *arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--budget", "1s"), "too small"),
        (("--budget", "never"), "--budget"),
        (("--trials", "0"), "--trials"),
        (("--rounds", "1"), "--rounds"),
        (("--objective", "speed"), "goodput"),
        (("--objective", "cost"), "--price"),
        (("--search", "bloc_size=16,32"), "did you mean block_size"),
        (("--search", "block_size"), "KNOB=VALUE"),
        (("--search", "block_size=5,6"), "block_size=5"),
        (("--space", "absent.yaml"), "absent.yaml"),
        (("--resume", "absent"), "holds no run"),
        (("--model", "absent"), "absent"),
    ],
)
def test_wrong_options_of_run(
    tmp_path: Path, in_process: Autotune, arguments: tuple[str, ...], message: str
) -> None:
    done = in_process("run", *arguments, *(() if "--resume" in arguments else ("-o", "out")))
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_bad_trace_line_is_named(tmp_path: Path, in_process: Autotune) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.9951690,many,109\n"
    )
    done = in_process("bench", "--workload", str(trace))
    assert done.returncode == 2
    assert "trace.csv" in done.stderr
    assert "line 3" in done.stderr
    assert "ContextTokens" in done.stderr


def test_output_folder_in_use(tmp_path: Path, in_process: Autotune) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    for command in ("run", "bench"):
        done = in_process(command, "-o", "out")
        assert done.returncode == 2
        assert "exists and is not empty" in done.stderr
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def test_output_folder_that_cannot_be_made(in_process: Autotune) -> None:
    done = in_process("run", "-o", "/proc/none/out")
    assert done.returncode == 3
    assert "/proc/none/out" in done.stderr
    assert "Traceback" not in done.stderr
