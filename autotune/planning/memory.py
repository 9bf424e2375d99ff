"""Where a GPU's memory goes under a config, and how many tokens its KV cache holds then.

Weights and cache follow from shapes. What else an engine takes is an estimate, told part by part:
an engine that runs measures it (`engine.device_memory`), a plan has no engine to ask.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from autotune.hardware.catalogue import Gpu
from autotune.planning.model_shape import ModelShape
from engine.block_groups import block_groups, longest_sequence, most_owned_blocks
from engine.config import KNOBS, EngineConfig
from engine.engine import CacheShape
from engine.graph_sizes import decode_sizes, most_sequences

PARTS = ("weights", "activations", "graphs", "libraries", "reserved", "kv_cache", "unused")

# The CUDA context with its modules and PyTorch's kernels takes about half a GiB, cuBLAS's
# workspaces and fragmentation the rest.
_LIBRARIES = 3 << 28
# NCCL's buffers and channels, of a rank that talks to others.
_COLLECTIVES = 1 << 29
# What the driver keeps of a captured step: about 10 MB for the 32 layers of an 8B model.
_GRAPH_LAYER = 300 << 10
# Tensors as wide as the residual that live at once in a layer, residual included.
_LIVE_HIDDEN = 4
# Float32 copies of the logits that sampling needs at its widest.
_LIVE_LOGITS = 3


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of one GPU by PARTS, which sum to `total`.

    `reserved` is what `gpu_memory_utilization` leaves alone. `kv_tokens` are those of as many
    sequences of `max_model_len` tokens as the cache holds, over all ranks of a replica. `cache` is
    None and `shortfall` the bytes that are missing on each GPU where not even one such sequence
    fits; `longest` is the longest sequence, in tokens, that does.
    """

    parts: Mapping[str, int]
    total: int
    kv_bytes_per_token: int
    kv_tokens: int
    max_model_len: int
    longest: int
    cache: CacheShape | None
    shortfall: int

    @property
    def fits(self) -> bool:
        """Whether the model serves its longest sequence in this memory."""
        return self.cache is not None

    @property
    def shortfall_bytes(self) -> int:
        """Bytes that are missing on each GPU; 0 where it fits."""
        return self.shortfall


def served_shape(shape: ModelShape, config: EngineConfig) -> ModelShape:
    """The shape with the dtype that a config asks for."""
    return shape if config.dtype == "auto" else dataclasses.replace(shape, dtype=config.dtype)


def longest_served(shape: ModelShape, config: EngineConfig) -> int:
    """Tokens of the longest sequence: as asked, or the model's limit."""
    return min(config.max_model_len or shape.max_position, shape.max_position)


def memory_plan(
    shape: ModelShape, gpu: Gpu, config: EngineConfig, *, cap_to_seats: bool = True
) -> MemoryPlan:
    """What serving takes of each GPU of a replica.

    Args:
        shape: the model.
        gpu: its memory.
        config: the knobs; quantization, cache, batch and sequence limits, ranks.
        cap_to_seats: no more cache than the engine could ever fill, as the engine does.

    Raises:
        KeyError: a quantization that does not exist.
    """
    shape = served_shape(shape, config)
    ranks, size = config.tensor_parallel_size, config.block_size
    length = longest_served(shape, config)
    groups = block_groups(shape.layer_windows, length)
    windows = [group.window for group in groups]
    layers = max(len(group.layers) for group in groups)
    per_block = size * layers * shape.layer_kv_bytes(config.kv_cache_dtype, ranks)
    total = gpu.memory_bytes
    parts = {
        "weights": shape.weight_bytes(config.quantization, ranks),
        "activations": _activations(shape, config),
        "graphs": _graphs(shape, config),
        "libraries": _LIBRARIES + (_COLLECTIVES if ranks > 1 else 0),
        "reserved": total - int(total * config.gpu_memory_utilization),
    }
    left = total - sum(parts.values())
    budget = left if config.kv_cache_memory_bytes is None else config.kv_cache_memory_bytes
    blocks = -(-length // size)
    per_sequence = most_owned_blocks(windows, blocks, size)
    fitting = max(0, min(budget, left) // per_block)
    shortfall = max(0, per_sequence * per_block - min(budget, left))
    cache = None
    if fitting >= per_sequence:
        ever = blocks * len(groups) * _most_seats(config)
        count = min(fitting, ever) if cap_to_seats else fitting
        cache = CacheShape(count, length, groups)
    taken = (cache.num_blocks if cache else fitting) * per_block
    parts["kv_cache"] = taken
    parts["unused"] = max(0, left - taken)
    if left < 0:  # the share that was to be left alone is what is missing first
        parts["reserved"] = max(0, parts["reserved"] + left)
    count = cache.num_blocks if cache else fitting
    tokens = count * size if windows == [0] else count * length // per_sequence
    return MemoryPlan(
        parts=MappingProxyType({name: parts[name] for name in PARTS}),
        total=total,
        kv_bytes_per_token=shape.kv_bytes_per_token(config.kv_cache_dtype, ranks),
        kv_tokens=tokens,
        max_model_len=length,
        longest=longest_sequence(windows, fitting, size, length),
        cache=cache,
        shortfall=0 if cache else shortfall,
    )


def _most_seats(config: EngineConfig) -> int:
    """Sequences that the cache is made for; `max_num_seqs` may be raised while it stays."""
    return max(config.max_num_seqs, int(KNOBS["max_num_seqs"].default))


def _activations(shape: ModelShape, config: EngineConfig) -> int:
    """The most that the tensors of the largest step take at once, on one rank."""
    ranks, tokens = config.tensor_parallel_size, config.max_num_batched_tokens
    queries = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    inner = 3 * shape.intermediate_size
    if shape.experts is not None:
        experts = shape.experts
        met = experts.top_k * (3 * experts.intermediate_size + shape.hidden_size)
        inner = max(inner if not all(experts.layers) else 0, met + 3 * experts.shared_size)
    widest = -(-max(queries, inner) // ranks)
    features = _LIVE_HIDDEN * shape.hidden_size + widest
    logits = most_sequences(config) * shape.vocab_size * 4 * _LIVE_LOGITS
    return tokens * features * shape.dtype_bytes + logits


def _graphs(shape: ModelShape, config: EngineConfig) -> int:
    if not config.cuda_graphs:
        return 0
    return len(decode_sizes(most_sequences(config))) * shape.num_layers * _GRAPH_LAYER
