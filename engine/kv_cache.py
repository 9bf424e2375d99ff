"""The paged KV cache: its tensors, and how many blocks of it a machine can hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.block_groups import BlockGroup, block_groups, longest_sequence, most_owned_blocks
from engine.config import KNOBS, EngineConfig
from engine.errors import EnvironmentLacks
from engine.models.spec import DecoderSpec
from kernels.layer_cache import LayerCache

CACHE_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
SCALE_BYTES = 4


def cache_dtype(config: EngineConfig, model_dtype: torch.dtype) -> torch.dtype:
    """The type of the cache's elements: that of `kv_cache_dtype`, or the model's own."""
    return CACHE_DTYPES.get(config.kv_cache_dtype, model_dtype)


def kv_bytes_per_token(spec: DecoderSpec, dtype: torch.dtype) -> int:
    """Bytes that one token's keys and values take over all layers, in a cache of `dtype`.

    A quantized cache also has a float32 scale for the key and the value of each head.
    """
    return spec.num_layers * _layer_bytes_per_token(spec, dtype)


def cache_bytes(
    config: EngineConfig,
    spec: DecoderSpec,
    model_dtype: torch.dtype,
    max_model_len: int,
    num_blocks: int,
) -> int:
    """Bytes of a cache of `num_blocks` blocks, as an engine of this config has it."""
    groups = block_groups(spec.layer_windows, max_model_len)
    per_token = _group_size(groups) * _layer_bytes_per_token(spec, cache_dtype(config, model_dtype))
    return num_blocks * config.block_size * per_token


def _layer_bytes_per_token(spec: DecoderSpec, dtype: torch.dtype) -> int:
    scale = SCALE_BYTES if dtype in CACHE_DTYPES.values() else 0
    return 2 * spec.num_kv_heads * (spec.head_dim * dtype.itemsize + scale)


@dataclass(frozen=True, slots=True)
class KVCache:
    """The cache of each layer; layers of different block groups share tensors."""

    layers: list[LayerCache]
    num_blocks: int
    block_size: int

    @classmethod
    def allocate(
        cls,
        spec: DecoderSpec,
        num_blocks: int,
        block_size: int,
        cache_dtype: torch.dtype,
        device: torch.device,
        groups: Sequence[BlockGroup] | None = None,
    ) -> KVCache:
        """Allocate and clear the caches.

        A block of a group lies at the same place in as many tensors as the largest group has
        layers: the j-th layers of all groups share a tensor. Without `groups` each layer has its
        own.

        Clearing touches every page now, so that memory which is not there is missed at the start
        and no step pays for a first touch.

        Raises:
            EnvironmentLacks: the device has not that much memory.
        """
        if groups is None:
            groups = [BlockGroup(0, tuple(range(spec.num_layers)))]
        shape = (num_blocks, spec.num_kv_heads, block_size, spec.head_dim)
        size = _group_size(groups)
        try:
            tensors = [LayerCache.allocate(shape, cache_dtype, device) for _ in range(size)]
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
            wanted = num_blocks * block_size * size * _layer_bytes_per_token(spec, cache_dtype)
            raise EnvironmentLacks(
                f"the KV cache of {_mib(wanted)} does not fit the memory of {device}: lower "
                "kv_cache_memory_bytes or gpu_memory_utilization"
            ) from error
        place = {layer: j for group in groups for j, layer in enumerate(group.layers)}
        return cls([tensors[place[i]] for i in range(spec.num_layers)], num_blocks, block_size)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers, shared tensors counted once."""
        return sum(layer.nbytes for layer in {id(layer): layer for layer in self.layers}.values())


def num_blocks_for(
    config: EngineConfig,
    spec: DecoderSpec,
    dtype: torch.dtype,
    max_model_len: int,
    budget: int,
    groups: Sequence[BlockGroup] | None = None,
    draft_bytes_per_token: int = 0,
) -> int:
    """Blocks of `dtype` that `budget` bytes hold, and no more than the engine could ever fill.

    Beside each block as many tokens find room in a draft model's cache.

    That is `max_num_seqs` sequences of `max_model_len` tokens; as `max_num_seqs` can be raised
    while the cache stays, not less than its default counts. By default one group has all layers.

    Raises:
        EnvironmentLacks: the budget does not hold one sequence of `max_model_len` tokens; it is
            below 0 where other things take more than is allowed.
    """
    if groups is None:
        groups = [BlockGroup(0, tuple(range(spec.num_layers)))]
    windows = [group.window for group in groups]
    size = config.block_size
    per_block = size * (
        _group_size(groups) * _layer_bytes_per_token(spec, dtype) + draft_bytes_per_token
    )
    length = -(-max_model_len // size)
    per_sequence = most_owned_blocks(windows, length, size)
    fitting = budget // per_block
    if budget <= 0 and config.kv_cache_memory_bytes is None:
        raise EnvironmentLacks(
            f"no memory is left for the KV cache: gpu_memory_utilization="
            f"{config.gpu_memory_utilization} is {_mib(-budget)} less than what is in use and the "
            "largest step take: raise it, lower max_num_batched_tokens or max_num_seqs, or set "
            "quantization"
        )
    if fitting < per_sequence:
        tokens = longest_sequence(windows, fitting, size, max_model_len)
        holder = "KV cache has"
        if draft_bytes_per_token:
            holder = "KV caches of the model and of its draft model have"
        lower = f"set max_model_len to at most {tokens} or " if tokens else ""
        raise EnvironmentLacks(
            f"the {holder} {_mib(budget)}, room for a sequence of {tokens} tokens, but one of "
            f"max_model_len={max_model_len} needs {_mib(per_sequence * per_block)} in blocks of "
            f"{per_block} bytes: {lower}raise kv_cache_memory_bytes to {per_sequence * per_block}"
        )
    most_sequences = max(config.max_num_seqs, int(KNOBS["max_num_seqs"].default))
    # A step's chunk lies beside the windows, and what windows give up stays to be found again.
    return min(fitting, length * len(groups) * most_sequences)


def _group_size(groups: Sequence[BlockGroup]) -> int:
    """Layers of a group, those that only fill it up included."""
    return max(len(group.layers) for group in groups)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):.1f} MiB"
