"""`autotune quantize` as a user runs it, on a tiny model."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from autotune.cli.layer_progress import LayerProgress
from autotune.cli.main import app
from engine.quantize.shard_writer import PROGRESS_FILE
from tests.engine.quantize.checkpoints import TEXT, content, make_model


@pytest.fixture(autouse=True)
def _little_text_and_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autotune.quality.TEXT_TOKENS", 1024)
    monkeypatch.setattr("autotune.quality.LEAST_TEXT_TOKENS", 1024)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model("llama", folder)
    return folder


def quantize(*arguments: str | Path) -> Result:
    words = [str(argument) for argument in arguments]
    return CliRunner().invoke(app, ["quantize", *words, "--device", "cpu"])


def test_a_checkpoint_with_its_report(model: Path, tmp_path: Path) -> None:
    result = quantize(model, "--method", "rtn", "--group-size", "32", "-o", tmp_path, "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["description"] == "rtn int4 group 32 symmetric"
    assert told["written_bytes"] < told["source_bytes"]
    quality = told["quality"]
    assert quality["quality_loss_low"] <= quality["quality_loss"] <= quality["quality_loss_high"]
    assert quality["kl"] > 0
    written = json.loads((tmp_path / "quality.json").read_text())
    assert written["quality"] == quality
    assert written["model"] == model.name
    card = (tmp_path / "README.md").read_text()
    assert f"{100 * quality['top1_agreement']:.3g}%" in card
    assert "The output head and the embeddings stay in floats" in card
    assert "layer 3 of 3" in result.stderr
    assert not (tmp_path / PROGRESS_FILE).exists()
    assert not (tmp_path / ".busy").exists()


def test_a_calibrated_table_for_people(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    arguments = ["--method", "awq", "--group-size", "32", "--sparsity", "2:4", "--asymmetric"]
    out = tmp_path / "out"
    result = quantize(model, *arguments, "--calibration", text, "-o", out)
    assert result.exit_code == 0, result.stderr
    assert "awq int4 group 32 asymmetric, 2:4 sparse" in result.stdout
    assert "top-1 agreement" in result.stdout
    assert result.stdout.strip().endswith(str(out))
    assert "half of the weights" in result.stderr
    assert "dequantize=True" in result.stderr


def test_the_prompts_of_a_workload_are_calibrated_on(model: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [{"prompt": line, "output_tokens": 4} for line in TEXT.splitlines()]
    trace.write_text("\n".join(json.dumps(row) for row in rows))
    out, again = tmp_path / "out", tmp_path / "again"
    arguments = ["--method", "gptq", "--group-size", "32", "--no-quality", "--json"]
    result = quantize(model, *arguments, "--workload", trace, "-o", out)
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["quality"] is None
    assert 1000 < told["calibration_tokens"] <= len(TEXT) + 2 * len(rows)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(TEXT.splitlines()))
    assert quantize(model, *arguments, "--calibration", text, "-o", again).exit_code == 0
    assert (out / "model-00002-of-00004.safetensors").read_bytes() == (
        again / "model-00002-of-00004.safetensors"
    ).read_bytes()


def test_ctrl_c_keeps_finished_layers_and_the_rest_is_resumed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--method", "gptq", "--group-size", "32", "--calibration-tokens", "600"]
    arguments.append("--no-quality")
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert quantize(model, *arguments, "-o", whole).exit_code == 0
    layer = LayerProgress.layer

    def interrupting(self: LayerProgress, done: int, total: int) -> None:
        layer(self, done, total)
        if done == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(LayerProgress, "layer", interrupting)
    result = quantize(model, *arguments, "-o", out)
    assert result.exit_code == 130
    assert "--resume" in result.stderr
    assert not (out / "config.json").exists()
    monkeypatch.setattr(LayerProgress, "layer", layer)
    begun = quantize(model, *arguments, "-o", out)
    assert begun.exit_code == 2
    assert "go on with what was begun in it with --resume" in begun.stderr
    result = quantize(model, *arguments, "-o", out, "--resume")
    assert result.exit_code == 0, result.stderr
    assert "layer 1 of 3" in result.stderr
    kept = {"README.md", "quality.json"}  # they name the folder and the seconds
    assert {n: c for n, c in content(out).items() if n not in kept} == {
        n: c for n, c in content(whole).items() if n not in kept
    }
    finished = quantize(model, *arguments, "-o", out, "--resume")
    assert finished.exit_code == 2
    assert "a finished checkpoint" in finished.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "nf4"], "quantization=nf4"),
        (["--method", "llm_int8"], "quantization=llm_int8"),
        (["--method", "gptq2"], "does not exist; there are rtn, gptq, awq"),
        (["--method", "awq", "--bits", "5"], "possible: 4 or 8"),
        (["--method", "fp8", "--bits", "4"], "possible: 8"),
        (["--method", "rtn", "--bits", "8", "--asymmetric"], "of integers in groups"),
        (["--method", "gptq", "--group-size", "100"], "possible: 16, 32"),
        (["--method", "rtn", "--calibration", "some.txt"], "has no effect"),
        (["--method", "awq", "--calibration", "absent.txt"], "absent.txt cannot be read"),
        (["--method", "awq", "--workload", "absent.csv"], "absent.csv"),
        (["--method", "awq", "--calibration", "a", "--workload", "b"], "give one"),
        (["--method", "rtn", "--resume"], "leave --resume out"),
        (["--method", "awq", "--device", "tpu"], "tpu"),
        (["--method", "none"], "changes nothing"),
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_2_and_one_sentence(
    arguments: list[str], words: str, model: Path, tmp_path: Path
) -> None:
    command = ["quantize", str(model), *arguments, "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "fault of ours" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_missing_model_and_a_used_folder_end_with_2(model: Path, tmp_path: Path) -> None:
    missing = quantize(tmp_path / "nowhere", "--method", "rtn", "-o", tmp_path / "out")
    assert missing.exit_code == 2
    assert "does not exist" in missing.stderr
    (tmp_path / "mine.txt").write_text("kept")
    used = quantize(model, "--method", "rtn", "-o", tmp_path)
    assert used.exit_code == 2
    assert "is not empty" in used.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_asymmetric_experts_are_refused(tmp_path: Path) -> None:
    make_model("mixtral", tmp_path / "model")
    out = tmp_path / "out"
    arguments = ["--method", "rtn", "--group-size", "32", "--asymmetric"]
    result = quantize(tmp_path / "model", *arguments, "-o", out)
    assert result.exit_code == 2
    assert "drops the zeros" in result.stderr
