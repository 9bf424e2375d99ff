"""What unset knobs came to on the machine that was measured, for engines that have to be told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from engine.config import EngineConfig
from engine.errors import EngineError

if TYPE_CHECKING:
    from engine.checkpoints.model_folder import ModelFolder


def measured_facts(config: EngineConfig, run: Mapping[str, Any]) -> dict[str, int]:
    """The model's length limit, and the bytes of KV cache, weights and device.

    `kv_cache_memory_bytes` and `weights_bytes` are of one rank. `kv_cache_tokens` is how many
    tokens those bytes held, `kv_cache_tokens_unquantized` how many they would hold in the model's
    own type.

    Args:
        config: the configuration that was measured.
        run: the content of `run.json`.

    Returns:
        What is known by name; without the model's folder only the memory of the device.
    """
    from engine.checkpoints.model_folder import open_model_folder
    from engine.kv_cache import cache_bytes, cache_dtype, kv_bytes_per_token
    from engine.loading import resolve_dtype, resolve_max_model_len
    from engine.models.registry import decoder_spec

    facts: dict[str, int] = {}
    if memory := (run.get("hardware") or {}).get("memory_bytes"):
        facts["device_memory_bytes"] = int(memory)
    try:
        folder = open_model_folder(config.model)
        spec = decoder_spec(folder)
        dtype = resolve_dtype(config, spec)
        length = resolve_max_model_len(config, spec)
    except EngineError:
        return facts
    facts["max_model_len"] = spec.max_position
    ranks = config.tensor_parallel_size
    facts["weights_bytes"] = _weights_bytes(folder, spec.num_parameters * dtype.itemsize) // ranks
    # Ranks beyond the number of KV heads hold copies.
    shares = min(ranks, spec.num_kv_heads)
    per_rank = config.kv_cache_memory_bytes
    engine = ((run.get("result") or {}).get("winner") or {}).get("engine") or {}
    if per_rank is None and (blocks := engine.get("kv_blocks_total")):
        per_rank = cache_bytes(config, spec, dtype, length, int(blocks)) // shares
    if per_rank is not None:
        facts["kv_cache_memory_bytes"] = per_rank
        held = per_rank * shares
        facts["kv_cache_tokens"] = held // kv_bytes_per_token(spec, cache_dtype(config, dtype))
        facts["kv_cache_tokens_unquantized"] = held // kv_bytes_per_token(spec, dtype)
    return facts


def _weights_bytes(folder: ModelFolder, unquantized: int) -> int:
    """Bytes of the checkpoint as another engine loads it: quantized ones by their files."""
    if folder.path.is_file():
        return folder.path.stat().st_size
    if "quantization_config" not in folder.config:
        return unquantized
    return sum(file.stat().st_size for file in folder.path.glob("*.safetensors"))
