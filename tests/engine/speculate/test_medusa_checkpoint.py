"""Published folders of Medusa heads are read; what does not fit is refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.config import EngineConfig
from engine.errors import ModelError
from engine.models.spec import DecoderSpec, RopeSpec
from engine.speculate.medusa_checkpoint import HEADS_FILE, load_medusa, read_medusa
from engine.speculate.medusa_heads import HeadWeights, MedusaWeights, ResidualLayer
from engine.speculate.medusa_writing import write_medusa
from tests.engine.rank_threads import load_shard, on_ranks
from tests.engine.tiny_llama import make_tiny_llama

HIDDEN, VOCABULARY = 16, 40
SPEC = DecoderSpec(
    architecture="LlamaForCausalLM",
    hidden_size=HIDDEN,
    intermediate_size=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    vocab_size=VOCABULARY,
    max_position=64,
    rms_norm_eps=1e-5,
    rope=RopeSpec(1e4),
    tie_word_embeddings=False,
    checkpoint_dtype="float32",
    layer_windows=(0,),
)
PUBLISHED = {
    "medusa_num_heads": 2,
    "medusa_num_layers": 1,
    "base_model_name_or_path": "lmsys/vicuna-7b-v1.3",
}


def save(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], file: str) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / file)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def published(
    num_heads: int = 2, num_layers: int = 1, *, outputs: bool = True
) -> dict[str, Tensor]:
    """Tensors as FasterDecoding's training saves them."""
    tensors = {}
    for head in range(num_heads):
        for layer in range(num_layers):
            tensors[f"{head}.{layer}.linear.weight"] = torch.randn(HIDDEN, HIDDEN)
            tensors[f"{head}.{layer}.linear.bias"] = torch.randn(HIDDEN)
        if outputs:
            tensors[f"{head}.{num_layers}.weight"] = torch.randn(VOCABULARY, HIDDEN)
    return tensors


def check(weights: MedusaWeights, tensors: dict[str, Tensor], prefix: str = "") -> None:
    for index, head in enumerate(weights.heads):
        for depth, layer in enumerate(head.layers):
            name = f"{prefix}{index}.{depth}.linear"
            assert torch.equal(layer.weight, tensors[f"{name}.weight"])
            assert layer.bias is not None
            assert torch.equal(layer.bias, tensors[f"{name}.bias"])
        assert head.output is not None
        assert torch.equal(head.output, tensors[f"{prefix}{index}.{len(head.layers)}.weight"])


@pytest.mark.parametrize("num_layers", [1, 2])
def test_heads_as_they_were_first_published(tmp_path: Path, num_layers: int) -> None:
    # The uploaded config names 2 heads where the file has 5: all of them count.
    tensors = published(5, num_layers)
    config = {**PUBLISHED, "medusa_num_layers": num_layers}
    weights = read_medusa(save(tmp_path, tensors, config, HEADS_FILE), SPEC, "model")
    assert (len(weights.heads), weights.num_layers) == (5, num_layers)
    check(weights, tensors)


def test_heads_without_a_config_and_without_residual_blocks(tmp_path: Path) -> None:
    tensors = published(3, 0)
    save_file(tensors, tmp_path / HEADS_FILE)
    weights = read_medusa(tmp_path, SPEC, "model")
    assert (len(weights.heads), weights.num_layers) == (3, 0)
    check(weights, tensors)


def test_heads_inside_the_checkpoint_of_their_model(tmp_path: Path) -> None:
    heads = {f"medusa_head.{name}": tensor for name, tensor in published(3).items()}
    model = {
        "model.embed_tokens.weight": torch.randn(VOCABULARY, HIDDEN),
        "model.layers.0.self_attn.q_proj.weight": torch.randn(HIDDEN, HIDDEN),
        "lm_head.weight": torch.randn(VOCABULARY, HIDDEN),
    }
    config = {"hidden_size": HIDDEN, "vocab_size": VOCABULARY, "num_hidden_layers": 1}
    config |= {"medusa_num_heads": 3, "medusa_num_layers": 1}
    save(tmp_path, {**model, **heads}, config, "model.safetensors")
    check(read_medusa(tmp_path, SPEC, "model"), heads, "medusa_head.")


def test_heads_that_end_in_the_models_output(tmp_path: Path) -> None:
    save(tmp_path, published(2, outputs=False), {**PUBLISHED, "version": "2"}, HEADS_FILE)
    weights = read_medusa(tmp_path, SPEC, "model")
    assert [head.output for head in weights.heads] == [None, None]


def vllm(num_heads: int, rows: int, *, bias: bool = False) -> dict[str, Tensor]:
    tensors = {}
    for head in range(num_heads):
        tensors[f"blocks.{head}.layers.0.weight"] = torch.randn(HIDDEN, HIDDEN)
        if bias:
            tensors[f"blocks.{head}.layers.0.bias"] = torch.randn(HIDDEN)
        tensors[f"lm_heads.{head}.weight"] = torch.randn(rows, HIDDEN)
    return tensors


VLLM = {
    "model_type": "medusa",
    "num_heads": 3,
    "num_hidden_layers": 1,
    "hidden_size": HIDDEN,
    "vocab_size": VOCABULARY,
}


@pytest.mark.parametrize("prefix", ["", "medusa_heads."])
def test_heads_as_vllm_stores_them(tmp_path: Path, prefix: str) -> None:
    tensors = vllm(3, VOCABULARY, bias=bool(prefix))
    stored = {prefix + name: tensor for name, tensor in tensors.items()}
    config = {**VLLM, "truncated_vocab_size": VOCABULARY}
    weights = read_medusa(save(tmp_path, stored, config, "model.safetensors"), SPEC, "model")
    for index, head in enumerate(weights.heads):
        assert torch.equal(head.layers[0].weight, tensors[f"blocks.{index}.layers.0.weight"])
        assert (head.layers[0].bias is not None) == bool(prefix)
        assert head.output is not None
        assert torch.equal(head.output, tensors[f"lm_heads.{index}.weight"])


@pytest.mark.parametrize("rows", [9, VOCABULARY])
def test_a_shorter_vocabulary_of_the_heads(tmp_path: Path, rows: int) -> None:
    token_map = torch.randperm(VOCABULARY)[:9]
    tensors = {**vllm(3, rows), "token_map": token_map}
    config = {**VLLM, "truncated_vocab_size": 9}
    weights = read_medusa(save(tmp_path, tensors, config, "model.safetensors"), SPEC, "model")
    assert weights.token_map is not None
    assert torch.equal(weights.token_map, token_map)
    stored = tensors["lm_heads.1.weight"]
    output = weights.heads[1].output
    assert output is not None
    assert torch.equal(output, stored if rows == 9 else stored[token_map])


@pytest.mark.parametrize("name", ["lm_head.weight", "lm_heads.0.weight", None])
def test_one_output_for_all_heads(tmp_path: Path, name: str | None) -> None:
    tensors = {n: t for n, t in vllm(3, VOCABULARY).items() if n.startswith("blocks")}
    if name is not None:
        tensors[name] = torch.randn(VOCABULARY, HIDDEN)
    config = {**VLLM, "original_lm_head": True}
    weights = read_medusa(save(tmp_path, tensors, config, "model.safetensors"), SPEC, "model")
    outputs = [head.output for head in weights.heads]
    assert all(output is outputs[0] for output in outputs)
    if name is None:
        assert outputs[0] is None
    else:
        assert outputs[0] is not None
        assert torch.equal(outputs[0], tensors[name])


def changed(name: str, tensor: Tensor | None) -> dict[str, Tensor]:
    tensors = {**published(), name: tensor}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize(
    ("tensors", "config", "says"),
    [
        (published(), {**PUBLISHED, "medusa_num_heads": 3}, "medusa_num_heads=3, .* 2 heads"),
        (published(), {**PUBLISHED, "medusa_num_layers": 2}, "medusa_num_layers=2, .* of 1 layers"),
        (published(), {**PUBLISHED, "medusa_num_heads": True}, "medusa_num_heads=True"),
        (published(), {**PUBLISHED, "hidden_size": 32}, "hidden size of 32, model has 16"),
        (published(), {**PUBLISHED, "vocab_size": 41}, "vocabulary of 41, model has 40"),
        (
            changed("1.0.linear.weight", torch.ones(20, 20)),
            PUBLISHED,
            r"hidden size of 20 \('1.0.linear.weight'\), model has 16",
        ),
        (changed("0.0.linear.bias", torch.ones(20)), PUBLISHED, "hidden size of 20"),
        (changed("0.1.weight", torch.ones(41, HIDDEN)), PUBLISHED, "vocabulary of 41"),
        (changed("0.1.weight", torch.ones(VOCABULARY, 20)), PUBLISHED, "hidden size of 20"),
        (changed("1.0.linear.weight", None), PUBLISHED, "layer 0 of head 1 is missing"),
        (changed("1.1.weight", None), PUBLISHED, "output of head 1 is missing"),
        (changed("3.0.linear.weight", torch.ones(HIDDEN, HIDDEN)), PUBLISHED, "is missing"),
        (changed("0.0.linear.weight", torch.ones(16)), PUBLISHED, "has 1 dimensions, 2"),
        (
            changed("0.0.linear.bias", torch.full((HIDDEN,), torch.nan)),
            PUBLISHED,
            "holds NaN or infinity",
        ),
        (
            changed("0.0.linear.bias", torch.ones(HIDDEN, dtype=torch.int64)),
            PUBLISHED,
            "is of int64",
        ),
        ({"something": torch.ones(3)}, PUBLISHED, "holds no Medusa heads"),
        (
            {**published(), "token_map": torch.tensor([1, 40])},
            PUBLISHED,
            "below the vocabulary of 40",
        ),
        ({**published(), "token_map": torch.tensor([1, 1])}, PUBLISHED, "lists a token twice"),
        (
            {**published(outputs=False), "token_map": torch.arange(4)},
            PUBLISHED,
            "no output of the heads that has its 4 rows",
        ),
        (published(), {**PUBLISHED, "medusa_calibration": [[1.0]]}, "for each of 2 heads"),
        (published(), {**PUBLISHED, "medusa_calibration": [[1.0], [-1]]}, "at least 0"),
        (published(), {**PUBLISHED, "medusa_calibration": [[1.0], ["a"]]}, "at least 0"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor], config: dict[str, Any], says: str
) -> None:
    folder = save(tmp_path, tensors, config, HEADS_FILE)
    with pytest.raises(ModelError, match=says) as caught:
        read_medusa(folder, SPEC, "model")
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_without_readable_heads(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        read_medusa(tmp_path / "none", SPEC, "model")
    with pytest.raises(ModelError, match="holds no Medusa heads: neither"):
        read_medusa(tmp_path, SPEC, "model")
    pickled = tmp_path / "medusa_lm_head.pt"
    pickled.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ModelError, match=r"pickle .* convert it once to medusa_lm_head.safetens"):
        read_medusa(tmp_path, SPEC, "model")
    with pytest.raises(ModelError, match="is a file: give the folder"):
        read_medusa(pickled, SPEC, "model")
    (tmp_path / HEADS_FILE).write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(ModelError, match="truncated or not a safetensors file"):
        read_medusa(tmp_path, SPEC, "model")


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    layer = ResidualLayer(torch.randn(HIDDEN, HIDDEN), torch.randn(HIDDEN))
    own = HeadWeights((layer, layer), torch.randn(VOCABULARY, HIDDEN))
    calibration = ((1.25, 0.5), (0.75, 1.0))
    for name, head in (("own", own), ("shared", HeadWeights((layer,)))):
        weights = MedusaWeights((head, head), calibration=calibration)
        folder = tmp_path / name
        folder.mkdir()
        write_medusa(folder, weights, SPEC, "base", {"medusa_accuracy": [0.5]})
        read = read_medusa(folder, SPEC, "model")
        assert read.calibration == calibration
        assert read.num_layers == len(head.layers)
        assert torch.equal(read.heads[1].layers[0].weight, layer.weight)
        assert (read.heads[1].output is None) == (head.output is None)
        config = json.loads((folder / "config.json").read_text())
        assert config["base_model_name_or_path"] == "base"
        assert config["medusa_accuracy"] == [0.5]
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", HEADS_FILE]


def test_the_rank_that_drafts_has_the_whole_output(tmp_path: Path) -> None:
    tiny = make_tiny_llama(tmp_path / "model", tie_word_embeddings=True)
    hidden, heads = tiny.model.config.hidden_size, tmp_path / "heads"
    layer = {f"{i}.0.linear.weight": torch.randn(hidden, hidden) * 0.1 for i in range(2)}
    save(heads, layer, PUBLISHED, HEADS_FILE)
    config = EngineConfig(model=str(tmp_path / "model"), speculative_model=str(heads))
    states = torch.randn(3, hidden)
    whole = on_ranks(
        1, tmp_path / "one", lambda ranks: load_medusa(config, load_shard(tiny.folder, ranks))
    )[0].logits(states)
    parts = on_ranks(
        2, tmp_path / "two", lambda ranks: load_medusa(config, load_shard(tiny.folder, ranks))
    )
    torch.testing.assert_close(parts[0].logits(states), whole)
