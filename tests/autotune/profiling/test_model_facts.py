"""A model's arithmetic from its config, against the loaded model and against counts by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autotune.profiling.model_facts import model_facts
from engine.config import EngineConfig
from engine.errors import ModelError
from engine.loading import load_model
from engine.quantize.method_table import METHODS

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def folder(path: Path, **changes: Any) -> str:
    """A model folder of a config and no weights."""
    path.mkdir(exist_ok=True)
    values = {k: v for k, v in (LLAMA | changes).items() if v is not None}
    (path / "config.json").write_text(json.dumps(values))
    return str(path)


def test_a_model_without_weights_has_facts_by_hand(tmp_path: Path) -> None:
    facts = model_facts(EngineConfig(model=folder(tmp_path / "m")))
    attention = 64 * (64 + 32 + 32) + 64 * 64
    mlp = 3 * 64 * 160
    linear = 3 * (attention + mlp)
    head = embeddings = 100 * 64
    norms = 3 * 2 * 64 + 64
    assert facts.name == "m"
    assert facts.fingerprint is None
    assert facts.parameters == linear + head + embeddings + norms
    assert facts.matmul_parameters == linear
    assert facts.head_parameters == head
    assert facts.head_bytes == 2 * head
    # The embedding table is resident and not read.
    assert facts.weight_bytes == 2 * (linear + norms + head)
    assert facts.resident_bytes == 2 * facts.parameters
    assert facts.kv_bytes_per_token == 2 * 3 * 2 * 16 * 2
    assert facts.kv_block_bytes == 16 * facts.kv_bytes_per_token
    assert facts.attention_features == 3 * 64
    assert (facts.weight_bits, facts.dtype, facts.quantization) == (16, "bfloat16", None)


def test_a_tied_head_is_read_and_resident_once(tmp_path: Path) -> None:
    tied = model_facts(EngineConfig(model=folder(tmp_path / "t", tie_word_embeddings=True)))
    loose = model_facts(EngineConfig(model=folder(tmp_path / "l")))
    assert tied.weight_bytes == loose.weight_bytes
    assert tied.resident_bytes == loose.resident_bytes - 2 * 100 * 64


@pytest.mark.parametrize("method", [m for m in METHODS if not METHODS[m].calibrated])
def test_resident_bytes_are_those_of_the_loaded_model(method: str) -> None:
    config = EngineConfig(quantization=method, kv_cache_memory_bytes=64 << 20, device="cpu")
    facts = model_facts(config)
    assert facts.path is not None
    loaded = load_model(config.replace(model=facts.path))
    # Rotary tables and padding of packed weights are a few percent of so small a model.
    assert facts.resident_bytes == pytest.approx(loaded.runner.decoder.nbytes, rel=0.05)
    assert facts.weight_bits == METHODS[method].weight_bits
    cache = loaded.runner.cache
    assert facts.kv_block_bytes * cache.num_blocks == pytest.approx(cache.nbytes)


@pytest.mark.parametrize(("dtype", "each"), [("auto", 16 * 2), ("int8", 16 + 4), ("fp8", 16 + 4)])
def test_quantized_caches_have_scales(tmp_path: Path, dtype: str, each: int) -> None:
    facts = model_facts(EngineConfig(model=folder(tmp_path / "m"), kv_cache_dtype=dtype))
    assert facts.kv_bytes_per_token == 3 * 2 * 2 * each


def test_ranks_that_hold_the_same_key_value_head_count_it_each(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", num_key_value_heads=1)
    one = model_facts(EngineConfig(model=path))
    two = model_facts(EngineConfig(model=path, tensor_parallel_size=2))
    assert two.kv_bytes_per_token == 2 * one.kv_bytes_per_token
    assert two.weight_bytes == one.weight_bytes
    path = folder(tmp_path / "n")
    halves = model_facts(EngineConfig(model=path, tensor_parallel_size=2))
    assert halves.kv_bytes_per_token == model_facts(EngineConfig(model=path)).kv_bytes_per_token


def test_a_token_meets_few_of_the_experts_and_memory_holds_all(tmp_path: Path) -> None:
    path = folder(
        tmp_path / "moe",
        architectures=["MixtralForCausalLM"],
        model_type="mixtral",
        num_local_experts=8,
        num_experts_per_tok=2,
    )
    facts = model_facts(EngineConfig(model=path))
    attention = 64 * (64 + 32 + 32) + 64 * 64
    expert = 3 * 64 * 160
    router = 8 * 64
    assert facts.has_experts
    assert (facts.num_experts, facts.experts_per_token) == (8, 2)
    assert facts.matmul_parameters == 3 * (attention + 2 * expert + router)
    assert facts.expert_bytes == 2 * 3 * 8 * expert
    norms = 3 * 2 * 64 + 64
    assert facts.weight_bytes == 2 * (3 * (attention + 8 * expert + router) + norms + 100 * 64)


def test_a_checkpoint_that_is_quantized_already_has_its_own_bits(tmp_path: Path) -> None:
    stored = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
    path = folder(tmp_path / "q", quantization_config=stored)
    facts = model_facts(EngineConfig(model=path))
    linear = 3 * (64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 160)
    assert facts.weight_bits == 4
    assert facts.quantization == "gptq 4 bits"
    floats = 2 * (3 * 2 * 64 + 64 + 100 * 64)
    # Half a byte an element; a scale of two bytes and a zero of half a byte for 32 of them.
    assert facts.weight_bytes == pytest.approx(linear * (0.5 + 2.5 / 32) + floats, abs=10)


def test_windows_and_float32_are_seen(tmp_path: Path) -> None:
    path = folder(
        tmp_path / "w",
        architectures=["MistralForCausalLM"],
        model_type="mistral",
        sliding_window=32,
        torch_dtype="float32",
    )
    facts = model_facts(EngineConfig(model=path, max_model_len=128))
    assert facts.has_windows
    assert facts.max_model_len == 128
    assert (facts.weight_bits, facts.dtype) == (32, "float32")
    assert facts.weight_bytes == 4 * (facts.parameters - 100 * 64)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        model_facts(EngineConfig(model=str(tmp_path / "nothing")))


def test_without_a_model_the_embedded_one_is_meant() -> None:
    facts = model_facts(EngineConfig())
    assert facts.name == "embedded"
    assert facts.parameters == 11_015_040
    assert facts.fingerprint is not None
