"""The paged KV cache: its tensors, and how many blocks of it a machine can hold."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from engine.config import KNOBS, EngineConfig
from engine.errors import EnvironmentLacks
from engine.models.spec import DecoderSpec
from kernels.layer_cache import LayerCache

CPU_DEFAULT_BYTES = 4 << 30


def kv_bytes_per_token(spec: DecoderSpec, dtype: torch.dtype) -> int:
    """Bytes that one token's keys and values take over all layers."""
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * dtype.itemsize


@dataclass(frozen=True, slots=True)
class KVCache:
    """The cache of each layer."""

    layers: list[LayerCache]
    num_blocks: int
    block_size: int

    @classmethod
    def allocate(
        cls,
        spec: DecoderSpec,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVCache:
        """Allocate and clear the caches.

        Clearing touches every page now, so that memory which is not there is missed at the start
        and no step pays for a first touch.

        Raises:
            EnvironmentLacks: the device has not that much memory.
        """
        shape = (num_blocks, spec.num_kv_heads, block_size, spec.head_dim)
        try:
            layers = [LayerCache.allocate(shape, dtype, device) for _ in range(spec.num_layers)]
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
            wanted = num_blocks * block_size * kv_bytes_per_token(spec, dtype)
            raise EnvironmentLacks(
                f"the KV cache of {_mib(wanted)} does not fit the memory of {device}: lower "
                "kv_cache_memory_bytes or gpu_memory_utilization"
            ) from error
        return cls(layers, num_blocks, block_size)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(layer.nbytes for layer in self.layers)


def cpu_cache_budget() -> int:
    """Bytes of KV cache on a CPU where nothing was asked for."""
    return min(CPU_DEFAULT_BYTES, int(psutil.virtual_memory().available) // 4)


def num_blocks_for(
    config: EngineConfig, spec: DecoderSpec, dtype: torch.dtype, max_model_len: int, budget: int
) -> int:
    """Blocks that `budget` bytes hold, and no more than the engine could ever fill.

    That is `max_num_seqs` sequences of `max_model_len` tokens; as `max_num_seqs` can be raised
    while the cache stays, not less than its default counts.

    Raises:
        EnvironmentLacks: the budget does not hold one sequence of `max_model_len` tokens.
    """
    per_token = kv_bytes_per_token(spec, dtype)
    per_block = per_token * config.block_size
    per_sequence = -(-max_model_len // config.block_size)
    fitting = budget // per_block
    if fitting < per_sequence:
        tokens = fitting * config.block_size
        lower = f"set max_model_len to at most {tokens} or " if tokens else ""
        raise EnvironmentLacks(
            f"the KV cache has {_mib(budget)}, room for {tokens} tokens of {per_token} bytes, but "
            f"one sequence of max_model_len={max_model_len} needs "
            f"{_mib(per_sequence * per_block)}: {lower}raise kv_cache_memory_bytes to "
            f"{per_sequence * per_block}"
        )
    most_sequences = max(config.max_num_seqs, int(KNOBS["max_num_seqs"].default))
    return min(fitting, per_sequence * most_sequences)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):.1f} MiB"
