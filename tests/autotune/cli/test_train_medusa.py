"""`autotune train-medusa` as a user runs it, on a tiny model that repeats itself."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from autotune.cli.main import app
from autotune.cli.training_progress import TrainingProgress
from engine.checkpoints.model_folder import open_model_folder
from engine.models.registry import decoder_spec
from engine.speculate.medusa_checkpoint import HEADS_FILE, read_medusa
from tests.engine.quantize.checkpoints import TEXT, make_model


@pytest.fixture(autouse=True)
def _little_and_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autotune.medusa.job._WRITTEN_TOKENS", 1500)
    monkeypatch.setattr("autotune.medusa.job._HELD_OUT_TOKENS", 300)
    monkeypatch.setattr("autotune.medusa.job._SEQUENCES", 8)
    monkeypatch.setattr("autotune.medusa.job._WINDOW", 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    # Small weights: it writes the same over and over, which heads learn in no time.
    made = make_model("llama", folder, vocab_size=128)
    for parameter in made.model.parameters():
        parameter.data *= 0.5
    made.model.save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT)
    return folder


def train(model: Path | str, *arguments: str | Path) -> Result:
    words = [str(argument) for argument in arguments]
    return CliRunner().invoke(app, ["train-medusa", str(model), *words, "--device", "cpu"])


def test_heads_that_are_right_of_what_the_model_writes(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "heads"
    options = ("--text", model / "text.txt", "-o", out, "--steps", "80", "--heads", "3")
    result = train(model, *options, "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert (told["heads"], told["layers"], told["own_output"]) == (3, 1, False)
    accuracy = told["medusa_accuracy"]["written"]
    assert accuracy["by_rank"][0][0] > 0.3
    assert told["medusa_accuracy"]["text"]["by_rank"][0][0] > 0.05
    assert accuracy["tokens_per_step"]["4"] > 1.3
    assert told["medusa_training"]["steps"] == 80
    config = json.loads((out / "config.json").read_text())
    assert config["medusa_num_heads"] == 3
    assert config["medusa_accuracy"] == told["medusa_accuracy"]
    assert config["base_model_name_or_path"] == str(model.resolve())
    weights = read_medusa(out, decoder_spec(open_model_folder(model)), "model")
    assert len(weights.heads) == len(weights.calibration) == 3
    assert bool(weights.heads[0].layers[0].weight.any())
    for stage in ("the model writes: ", "the heads learn: step 1, loss", "judging"):
        assert stage in result.stderr


def test_a_table_for_people_and_the_same_again(model: Path, tmp_path: Path) -> None:
    options = ("--text", model / "text.txt", "--steps", "5", "--own-output", "--layers", "2")
    result = train(model, *options, "-o", tmp_path / "one")
    assert result.exit_code == 0, result.stderr
    assert "5 steps over" in result.stdout
    assert "right after what the model writes" in result.stdout
    assert "right in the text" in result.stdout
    assert "head 4 (4 ahead)" in result.stdout
    assert "tokens a step by drafted tokens  1: " in result.stdout
    assert result.stdout.strip().endswith(str(tmp_path / "one"))
    assert train(model, *options, "-o", tmp_path / "two").exit_code == 0
    one, two = ((tmp_path / name / HEADS_FILE).read_bytes() for name in ("one", "two"))
    assert one == two


def test_minutes_end_the_training(model: Path, tmp_path: Path) -> None:
    options = ("--text", model / "text.txt", "--minutes", "0.001", "--heads", "2", "--json")
    result = train(model, *options, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    # Writing had no time; some steps are taken in any case.
    assert json.loads(result.stdout)["medusa_training"]["steps"] == 50


def test_interrupted_heads_are_kept_as_far_as_they_came(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt_in(wanted: str) -> None:
        def hear(_self: TrainingProgress, stage: str, _share: float, _detail: str) -> None:
            if stage == wanted:
                monkeypatch.undo()
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(TrainingProgress, "__call__", hear)

    out = tmp_path / "out"
    options = ("--text", model / "text.txt", "--steps", "100000", "-o", out, "--heads", "2")
    interrupt_in("the model writes")
    result = train(model, *options)
    assert result.exit_code == 130
    assert "Interrupted: stopped while the model wrote" in result.stderr
    assert not out.exists()
    interrupt_in("the heads learn")
    result = train(model, *options)
    assert result.exit_code == 130, result.stderr
    assert "as good as 1 steps made them" in result.stderr
    config = json.loads((out / "config.json").read_text())
    assert config["medusa_training"]["interrupted"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--text", "{model}/none.txt"), "none.txt cannot be read: No such file"),
        (("--text", "{model}/model.safetensors"), "is not UTF-8 text"),
        (("--text", "{tmp}/empty.txt"), "empty.txt is empty"),
        (("--text", "{tmp}/short.txt"), "too few to learn from"),
        ((), "--text is missing"),
        (("--text", "{model}/text.txt", "--heads", "0"), "--heads 0 must be from 1 to 16"),
        (("--text", "{model}/text.txt", "--layers", "9"), "--layers 9 must be from 1 to 8"),
        (("--text", "{model}/text.txt", "--steps", "0"), "--steps 0 must be at least 1"),
        (("--text", "{model}/text.txt", "--minutes", "0"), "--minutes 0 must be above 0"),
    ],
)
def test_wrong_input_ends_with_2_and_writes_nothing(
    model: Path, tmp_path: Path, options: tuple[str, ...], says: str
) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("a b c")
    words = [word.format(model=model, tmp=tmp_path) for word in options]
    result = train(model, *words, "-o", tmp_path / "out")
    assert result.exit_code == 2, result.stderr
    assert says in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_and_a_model_that_cannot_be_read(model: Path, tmp_path: Path) -> None:
    result = train(model, "--text", model / "text.txt", "-o", model)
    assert result.exit_code == 2
    assert "exists and is not empty" in result.stderr
    result = train(tmp_path / "none", "--text", model / "text.txt", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "does not exist" in result.stderr
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare" / name).write_bytes((model / name).read_bytes())
    result = train(tmp_path / "bare", "--text", model / "text.txt", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "holds no tokenizer" in result.stderr


def test_training_begins_as_the_seed_says(model: Path, tmp_path: Path) -> None:
    options = ("--text", model / "text.txt", "--steps", "2", "--heads", "1")
    for seed in ("0", "1"):
        assert train(model, *options, "--seed", seed, "-o", tmp_path / seed).exit_code == 0
    one, two = (
        read_medusa(tmp_path / seed, decoder_spec(open_model_folder(model)), "model")
        for seed in ("0", "1")
    )
    assert not torch.equal(one.heads[0].layers[0].weight, two.heads[0].layers[0].weight)
