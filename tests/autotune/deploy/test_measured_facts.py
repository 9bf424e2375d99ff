"""What unset knobs came to, against shapes that are counted by hand."""

import json
from pathlib import Path
from typing import Any

from autotune.deploy.measured_facts import measured_facts
from engine.config import EngineConfig

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "torch_dtype": "float32",
    "tie_word_embeddings": True,
}
# K and V of 3 layers, 2 heads of 8, in float32; in int8 a byte each and a float32 scale a head.
TOKEN = 2 * 3 * 2 * 8 * 4
TOKEN_INT8 = 2 * 3 * 2 * (8 + 4)
# Embedding; per layer q and o, k and v, three of the MLP, two norms; the last norm.
PARAMETERS = 100 * 32 + 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32) + 32
RUN: dict[str, Any] = {
    "hardware": {"device": "cpu", "memory_bytes": 1 << 34},
    "result": {"winner": {"engine": {"kv_blocks_total": 50}}},
}


def model(folder: Path, **changes: Any) -> str:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return str(folder)


def test_bytes_and_tokens_of_the_cache(tmp_path: Path) -> None:
    config = EngineConfig(model=model(tmp_path), block_size=32)
    assert measured_facts(config, RUN) == {
        "device_memory_bytes": 1 << 34,
        "max_model_len": 512,
        "weights_bytes": PARAMETERS * 4,
        "kv_cache_memory_bytes": 50 * 32 * TOKEN,
        "kv_cache_tokens": 50 * 32,
        "kv_cache_tokens_unquantized": 50 * 32,
    }


def test_a_quantized_cache_holds_more_than_the_models_type_would(tmp_path: Path) -> None:
    config = EngineConfig(model=model(tmp_path), block_size=32, kv_cache_dtype="int8")
    facts = measured_facts(config, RUN)
    assert facts["kv_cache_memory_bytes"] == 50 * 32 * TOKEN_INT8
    assert facts["kv_cache_tokens"] == 50 * 32
    assert facts["kv_cache_tokens_unquantized"] == 50 * 32 * TOKEN_INT8 // TOKEN


def test_each_rank_has_its_share(tmp_path: Path) -> None:
    config = EngineConfig(model=model(tmp_path), block_size=32, tensor_parallel_size=4)
    facts = measured_facts(config, RUN)
    assert facts["weights_bytes"] == PARAMETERS * 4 // 4
    # Two KV heads on four ranks: each is held twice.
    assert facts["kv_cache_memory_bytes"] == 50 * 32 * TOKEN // 2
    assert facts["kv_cache_tokens"] == 50 * 32


def test_asked_bytes_are_those(tmp_path: Path) -> None:
    config = EngineConfig(model=model(tmp_path), kv_cache_memory_bytes=1000 * TOKEN)
    facts = measured_facts(config, {})
    assert facts["kv_cache_memory_bytes"] == 1000 * TOKEN
    assert facts["kv_cache_tokens"] == 1000
    assert "device_memory_bytes" not in facts


def test_a_quantized_checkpoint_is_as_large_as_its_files(tmp_path: Path) -> None:
    folder = model(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    (tmp_path / "model.safetensors").write_bytes(b"x" * 12345)
    assert measured_facts(EngineConfig(model=folder), RUN)["weights_bytes"] == 12345


def test_without_the_model_only_the_machine_is_known() -> None:
    facts = measured_facts(EngineConfig(model="/no/such/model"), RUN)
    assert facts == {"device_memory_bytes": 1 << 34}
