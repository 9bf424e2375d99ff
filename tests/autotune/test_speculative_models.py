from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from autotune.cli.knob_options import chosen_knobs
from autotune.embedded import DRAFT, TARGET
from autotune.model_info import with_default_model
from autotune.search.options import TuneOptions
from autotune.speculative_models import (
    check_speculative_models,
    folder_for,
    methods_with_models,
    with_speculative_model,
)
from engine.checkpoints.model_folder import open_model_folder
from engine.config import EngineConfig
from engine.errors import ConfigError, ModelError
from engine.models.registry import decoder_spec


@pytest.mark.parametrize("model", ["", str(TARGET)])
def test_the_embedded_model_has_its_own_draft(model: str) -> None:
    knobs = {"model": model, "speculative_method": "draft_model"}
    assert with_speculative_model(knobs) == {**knobs, "speculative_model": str(DRAFT)}
    assert chosen_knobs(None, knobs)["speculative_model"] == str(DRAFT)
    options = TuneOptions(
        config={"model": model}, narrowing={"speculative_method": ["draft_model"]}
    )
    assert options.default_knobs["speculative_model"] == str(DRAFT)
    assert methods_with_models(EngineConfig(model=model)) == (
        "none",
        "ngram",
        "suffix",
        "draft_model",
    )


def test_a_file_of_knobs_gets_it_too(tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text("speculative_method: draft_model\n")
    assert chosen_knobs(file, {})["speculative_model"] == str(DRAFT)
    assert chosen_knobs(file, {"speculative_model": "mine"})["speculative_model"] == "mine"


def test_another_model_has_none_and_its_user_is_told() -> None:
    knobs = {"model": "another", "speculative_method": "draft_model"}
    assert with_speculative_model(knobs) == knobs
    with pytest.raises(ConfigError, match="needs speculative_model"):
        chosen_knobs(None, knobs)
    assert methods_with_models(EngineConfig(model="another")) == ("none", "ngram", "suffix")


def test_what_is_given_is_heads_if_its_files_say_so(tmp_path: Path) -> None:
    small, heads, other, published = (tmp_path / n for n in ("small", "heads", "other", "pt"))
    for folder, content in (
        (small, {"hidden_size": 8}),
        (heads, {"medusa_num_heads": 4}),
        (other, {"model_type": "medusa"}),
    ):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(content))
    published.mkdir()
    (published / "medusa_lm_head.safetensors").write_bytes(b"")
    for folder in (small, heads, other, published):
        method = "draft_model" if folder == small else "medusa"
        config = EngineConfig(model="m", speculative_model=str(folder))
        assert methods_with_models(config) == ("none", "ngram", "suffix", method)
        assert folder_for(method, config) == str(folder)
    # A folder that cannot be read is taken for a model: loading it says what is wrong.
    absent = EngineConfig(model="m", speculative_model=str(tmp_path / "absent"))
    assert "draft_model" in methods_with_models(absent)


def test_what_the_default_drafts_with_can_be_chosen_whatever_its_files_say() -> None:
    config = EngineConfig(model="m", speculative_method="medusa", speculative_model="heads")
    assert methods_with_models(config) == ("none", "ngram", "suffix", "draft_model", "medusa")
    assert folder_for("medusa", config) == "heads"


def test_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small").mkdir()
    monkeypatch.chdir(tmp_path)
    config = EngineConfig(speculative_method="draft_model", speculative_model="small")
    assert with_default_model(config).speculative_model == str(tmp_path / "small")


def test_what_would_not_fit_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    embedded = EngineConfig(model=str(TARGET))
    spec = decoder_spec(open_model_folder(TARGET))
    every = ("none", "ngram", "draft_model", "medusa")
    check_speculative_models(embedded, every, spec)
    other = tmp_path / "other"
    shutil.copytree(DRAFT, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": 4095}))
    mine = embedded.replace(speculative_model=str(other))
    with pytest.raises(ConfigError, match=r"4095 tokens and the model .* 4096"):
        check_speculative_models(mine, every, spec)
    check_speculative_models(mine, ("none", "ngram"), spec)
    absent = embedded.replace(speculative_model=str(tmp_path / "absent"))
    with pytest.raises(ModelError, match="absent"):
        check_speculative_models(absent, every, spec)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "medusa_lm_head.pt").write_bytes(b"")
    with pytest.raises(ModelError, match=r"medusa_lm_head\.pt"):
        check_speculative_models(embedded.replace(speculative_model=str(pickled)), every, spec)
