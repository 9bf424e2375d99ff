"""Keys and values from slots to slots on a CPU, by the native kernel."""

import torch
from torch import Tensor

from kernels.cpu.native import library
from kernels.layer_cache import LayerCache


def move_kv(cache: LayerCache, sources: Tensor, targets: Tensor) -> bool:
    """As ``ops.move_kv``; False if the operands are not of the expected kind."""
    native = library()
    if native is None or not cache.keys.is_cpu:
        return False
    tensors = (cache.keys, cache.values, cache.key_scales, cache.value_scales)
    if not all(t is None or t.is_contiguous() for t in tensors):
        return False
    if cache.keys.dtype != cache.values.dtype or sources.shape != targets.shape:
        return False
    for slots in (sources, targets):
        if not (slots.is_cpu and slots.dtype == torch.int64 and slots.is_contiguous()):
            return False
    native.move_kv(
        *(None if t is None else t.data_ptr() for t in tensors),
        sources.data_ptr(),
        targets.data_ptr(),
        sources.shape[0],
        cache.num_kv_heads,
        cache.block_size,
        cache.keys.shape[3] * cache.keys.element_size(),
    )
    return True
