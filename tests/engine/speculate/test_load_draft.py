"""A draft model's tokens must be the model's own; whatever else is there is refused with why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoints.model_folder import open_model_folder
from engine.config import EngineConfig
from engine.errors import ConfigError, ModelError
from engine.models.decoder import Decoder
from engine.models.registry import decoder_spec
from engine.parallel import GroupRanks
from engine.speculate.load_draft import load_draft
from tests.engine.tiny_models import make_tiny
from tests.engine.tiny_tokenizers import byte_level

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target, and a draft that is smaller and of another family."""
    root = tmp_path_factory.mktemp("pair")
    make_tiny("llama", root / "target", dtype=torch.bfloat16)
    make_tiny("qwen3", root / "draft", num_hidden_layers=1)
    return root / "target", root / "draft"


def load(target: Path, draft: Path | None, ranks: Any = None, **knobs: Any) -> Decoder:
    config = EngineConfig.from_mapping(
        {
            "model": str(target),
            "speculative_method": "draft_model",
            "speculative_model": str(draft),
            "device": "cpu",
            **knobs,
        }
    )
    spec = decoder_spec(open_model_folder(target))
    return load_draft(config, spec, target, CPU, *([ranks] if ranks else []))


def write_tokenizers(folders: tuple[Path, Path], change: Any = None) -> list[Path]:
    files = [folder / "tokenizer.json" for folder in folders]
    for file in files:
        byte_level().save(str(file))
    if change is not None:
        content = json.loads(files[1].read_text())
        change(content)
        files[1].write_text(json.dumps(content))
    return files


def test_a_draft_computes_in_the_model_s_dtype(folders: tuple[Path, Path]) -> None:
    decoder = load(*folders)
    assert decoder.dtype == torch.bfloat16
    assert decoder.spec.num_layers == 1
    assert load(*folders, dtype="float32").dtype == torch.float32


def test_another_vocabulary_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    make_tiny("llama", tmp_path / "wide", vocab_size=130)
    with pytest.raises(ConfigError, match=r"wide has 130 tokens and the .*target 128: choose"):
        load(folders[0], tmp_path / "wide")


def test_another_tokenizer_is_refused(folders: tuple[Path, Path]) -> None:
    def swap(content: dict[str, Any]) -> None:
        vocab = content["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    def drop(content: dict[str, Any]) -> None:
        del content["model"]["vocab"]["z"]

    def decorate(content: dict[str, Any]) -> None:
        content["normalizer"] = None
        content["model"]["merges"] = content["model"]["merges"][:-1]

    files = write_tokenizers(folders)
    try:
        load(*folders)
        files = write_tokenizers(folders, swap)
        with pytest.raises(ConfigError, match=r"differ in 2 tokens: 'a' is \d+ in the draft's"):
            load(*folders)
        files = write_tokenizers(folders, drop)
        with pytest.raises(ConfigError, match=r"'z' is missing in the draft's .* and \d+ in the"):
            load(*folders)
        # How text is cut is the model's tokenizer's business: ids must mean the same.
        files = write_tokenizers(folders, decorate)
        load(*folders)
        files[0].unlink()  # only one has a tokenizer: sizes must do
        load(*folders)
    finally:
        for file in files:
            file.unlink(missing_ok=True)


def test_bad_folders(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere does not exist"):
        load(folders[0], tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load(folders[0], tmp_path / "empty")


def test_a_draft_that_the_ranks_cannot_divide(folders: tuple[Path, Path]) -> None:
    ranks = GroupRanks(1, 8, CPU)
    with pytest.raises(ConfigError, match=r"draft cannot be divided as the .*4 attention"):
        load(*folders, ranks=ranks)
