"""Folders as users have them, whole and broken in every way; each error names what is wrong."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import LLM
from engine.checkpoints.model_folder import open_model_folder
from engine.config import EngineConfig
from engine.errors import ConfigError, EnvironmentLacks, ModelError
from engine.loading import load_model
from tests.engine.tiny_llama import TinyLlama, make_tiny_llama


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    return make_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(tiny: TinyLlama, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(tiny.folder, tmp_path / "model"))


def load(folder: Path | str, **knobs: Any) -> LLM:
    return LLM(str(folder), **{"device": "cpu", "max_model_len": 64, "num_threads": 1, **knobs})


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(fields)
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "REMOVE"}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path)


def shard(folder: Path) -> dict[str, Any]:
    """Split the weights over two files with an index, as large models come."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    path.unlink()
    names = sorted(tensors)
    files = {
        "model-00001-of-00002.safetensors": names[: len(names) // 2],
        "model-00002-of-00002.safetensors": names[len(names) // 2 :],
    }
    weight_map = {}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, folder / file)
        weight_map.update(dict.fromkeys(held, file))
    index = {"metadata": {}, "weight_map": weight_map}
    write_index(folder, index)
    return index


def write_index(folder: Path, index: dict[str, Any]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_sharded_weights_are_those_of_a_single_file(tiny: TinyLlama, folder: Path) -> None:
    shard(folder)
    whole = load(tiny.folder).engine.executor.decoder
    parts = load(folder).engine.executor.decoder
    for a, b in zip(whole.layers, parts.layers, strict=True):
        pairs = [(a.qkv, b.qkv), (a.output, b.output)]
        pairs += [(a.mlp.gate_up, b.mlp.gate_up), (a.mlp.down, b.mlp.down)]
        assert all(torch.equal(mine.data, other.data) for mine, other in pairs)
    assert torch.equal(whole.head.data, parts.head.data)


def test_weights_are_held_once(tiny: TinyLlama, tmp_path: Path) -> None:
    spec_bytes = load_model(EngineConfig(model=str(tiny.folder), device="cpu", max_model_len=64))
    decoder = spec_bytes.runner.decoder
    assert decoder.nbytes == 4 * decoder.spec.num_parameters
    tied = make_tiny_llama(tmp_path, tie_word_embeddings=True)
    decoder = load(tied.folder).engine.executor.decoder
    assert decoder.head is decoder.embedding
    assert decoder.nbytes == 4 * decoder.spec.num_parameters


def test_eos_ids(folder: Path) -> None:
    (folder / "generation_config.json").unlink(missing_ok=True)
    edit_config(folder, eos_token_id=5)
    assert open_model_folder(folder).eos_token_ids() == (5,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert open_model_folder(folder).eos_token_ids() == (7, 8)
    (folder / "generation_config.json").write_text('{"eos_token_id": "end"}')
    with pytest.raises(ModelError, match=r"generation_config\.json: eos_token_id .* 'end'"):
        open_model_folder(folder).eos_token_ids()


def test_older_spellings_of_rope_and_dtype(folder: Path) -> None:
    scaling = {
        "type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    edit_config(
        folder,
        rope_parameters="REMOVE",
        rope_theta=5000.0,
        rope_scaling=scaling,
        dtype="REMOVE",
        torch_dtype="float16",
    )
    spec = load_model(EngineConfig(model=str(folder), device="cpu", max_model_len=64)).spec
    assert spec.rope.theta == 5000.0
    assert spec.rope.kind == "llama3"
    assert spec.rope.original_max_position == 32
    assert spec.checkpoint_dtype == "float16"


def test_no_folder() -> None:
    with pytest.raises(ModelError, match=r"/no/such/folder does not exist"):
        load("/no/such/folder")
    with pytest.raises(ModelError, match="no model was given"):
        load("")


def test_a_file_is_not_a_folder(folder: Path) -> None:
    with pytest.raises(
        ModelError, match=r"is a file: give the folder that holds its config\.json, or a \.gguf"
    ):
        load(folder / "config.json")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "config.json is not valid JSON"),
        (b"[1]", "must hold a JSON object, it holds a list"),
        (b"\xff\xfe", "is not UTF-8 text: byte 0"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "is not valid JSON"),
    ],
)
def test_broken_config(folder: Path, content: bytes, message: str) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "GPT2LMHeadModel is not supported; supported are LlamaForCausalLM, Mistral",
        ),
        ({"architectures": None, "model_type": "qwen9"}, "qwen9 is not supported"),
        ({"architectures": None, "model_type": None}, "names no architecture"),
        ({"architectures": "Llama", "model_type": None}, "names no architecture"),
        ({"hidden_size": "REMOVE"}, "hidden_size is missing"),
        ({"hidden_size": -4}, "hidden_size must be a positive integer, got -4"),
        ({"hidden_size": 10**400}, "hidden_size must be at most 9223372036854775807, got more"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a positive number"),
        ({"rope_theta": 10**400}, "rope_theta must be a positive number"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a positive integer"),
        ({"vocab_size": 1.5}, "vocab_size must be a positive integer, got 1.5"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a positive number"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads=3"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"dtype": "float8"}, "dtype 'float8' is not supported"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"rope_parameters": [1]}, "rope_parameters must be an object"),
        (
            {"rope_parameters": {"rope_type": "axial"}},
            "rope_type 'axial' is not supported; default",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters: factor is missing"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor must be 1",
        ),
        (
            {"quantization_config": {"quant_method": "awq"}},
            "says 'awq', but .* the weights are floats",
        ),
    ],
)
def test_configs_that_cannot_be_served(folder: Path, fields: dict[str, Any], message: str) -> None:
    edit_config(folder, **fields)
    with pytest.raises(ModelError, match=message) as error:
        load(folder)
    assert "config.json" in str(error.value)


def test_only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"pickles .* can run any code"):
        load(folder)


NAME = "model.layers.1.mlp.down_proj.weight"


def test_missing_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(NAME))
    with pytest.raises(ModelError, match=rf"model\.safetensors has no tensor '{re.escape(NAME)}'"):
        load(folder)


def test_wrong_shape(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({NAME: torch.zeros(64, 95)}))
    message = rf"'{re.escape(NAME)}' has shape \[64, 95\], config.json asks for \[64, 96\]"
    with pytest.raises(ModelError, match=message):
        load(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"intermediate_size": 10**12},
        {"vocab_size": 10**12},
        {"head_dim": 10**12},
        {"num_hidden_layers": 10**12},
    ],
)
def test_absurd_sizes_take_no_memory(folder: Path, fields: dict[str, int]) -> None:
    edit_config(folder, **fields)
    with pytest.raises(ModelError, match=r"config\.json asks for|has no tensor|at most"):
        load(folder)


def test_an_absurd_length_takes_no_memory(folder: Path) -> None:
    edit_config(folder, max_position_embeddings=10**12)
    with pytest.raises(EnvironmentLacks, match="set max_model_len to at most"):
        load(folder, max_model_len=None)


def test_wrong_dtype(folder: Path) -> None:
    edit_tensors(
        folder, lambda tensors: tensors.update({NAME: torch.zeros(64, 96, dtype=torch.int8)})
    )
    with pytest.raises(ModelError, match=rf"'{re.escape(NAME)}' is of int8"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_truncated_file(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors \(\d+ bytes\) is truncated"):
        load(folder)


def test_missing_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors is missing"):
        load(folder)


def test_index_names_a_tensor_that_its_shard_lacks(folder: Path) -> None:
    index = shard(folder)
    index["weight_map"][NAME] = next(
        file for file in set(index["weight_map"].values()) if file != index["weight_map"][NAME]
    )
    write_index(folder, index)
    with pytest.raises(ModelError, match=rf"has no tensor '{re.escape(NAME)}', though"):
        load(folder)


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/x.safetensors", "a/../../x", "", "x" * 5000, 3]
)
def test_index_leaves_the_folder(folder: Path, file: Any) -> None:
    index = shard(folder)
    index["weight_map"][NAME] = file
    write_index(folder, index)
    with pytest.raises(ModelError, match="a file in the model's folder is wanted"):
        load(folder)


def test_index_without_a_map(folder: Path) -> None:
    shard(folder)
    write_index(folder, {"weight_map": {}})
    with pytest.raises(ModelError, match="has no weight_map"):
        load(folder)


def test_lengths_and_memory(folder: Path) -> None:
    with pytest.raises(ConfigError, match="max_model_len=1000 is above the model's limit of 256"):
        load(folder, max_model_len=1000)
    message = "room for a sequence of 16 tokens.*set max_model_len to at most 16 or raise"
    with pytest.raises(EnvironmentLacks, match=message):
        load(folder, kv_cache_memory_bytes=20 * 768)
    with pytest.raises(EnvironmentLacks, match=f"raise kv_cache_memory_bytes to {64 * 768}"):
        load(folder, kv_cache_memory_bytes=5)
    assert load(folder, kv_cache_memory_bytes=64 * 768).engine.pool.num_blocks == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(folder: Path) -> None:
    with pytest.raises(EnvironmentLacks, match="no CUDA device"):
        load(folder, device="cuda")
