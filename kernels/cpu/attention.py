"""Paged attention on a CPU: native kernels that read the pages where they lie."""

import ctypes

import torch
from torch import Tensor

from kernels.cpu.native import CACHE_CODES, DTYPE_CODES, has_amx, library, takes
from kernels.layer_cache import LayerCache
from kernels.metadata import AttentionMetadata

STRIP = 16  # elements of a head that are taken together
TILE_DIMENSIONS = 32  # and, on AMX, whole tiles
LARGEST_TILED_HEAD = 256


class AttentionStep(ctypes.Structure):
    """What one call is asked for; the same struct as in ``native/attention_step.h``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "keys", "values")),
        *((name, ctypes.c_void_p) for name in ("key_scales", "value_scales")),
        *((name, ctypes.c_void_p) for name in ("tables", "context_lens", "query_start")),
        *((name, ctypes.c_void_p) for name in ("trees", "out")),
        *((name, ctypes.c_int64) for name in ("table_stride", "sequences", "q_heads", "kv_heads")),
        *((name, ctypes.c_int64) for name in ("block_size", "head_dim", "q_stride", "window")),
        *((name, ctypes.c_float) for name in ("scale", "soft_cap")),
    )


def _known(q: Tensor, cache: LayerCache, metadata: AttentionMetadata) -> bool:
    """Whether dtypes and strides are those that the native kernels read."""
    tables, trees = metadata.block_tables, metadata.trees
    if trees is not None and not (trees.dtype == torch.int64 and trees.is_contiguous()):
        return False
    if not takes(q) or q.dim() != 3 or q.shape[2] % STRIP:
        return False
    if not (q.stride(2) == 1 and q.stride(1) == q.shape[2]):
        return False
    keys, values = cache.keys, cache.values
    if not (keys.is_contiguous() and values.is_contiguous() and keys.dtype == values.dtype):
        return False
    if cache.key_scales is None or cache.value_scales is None:
        known = keys.dtype == q.dtype
    else:
        scales = cache.key_scales, cache.value_scales
        known = keys.dtype in CACHE_CODES and keys.dtype not in DTYPE_CODES
        known = known and all(s.dtype == torch.float32 and s.is_contiguous() for s in scales)
    return known and tables.dtype == torch.int32 and tables.stride(-1) == 1


def paged_attention(
    q: Tensor,
    cache: LayerCache,
    metadata: AttentionMetadata,
    scale: float,
    window: int,
    soft_cap: float,
) -> Tensor | None:
    """As ``ops.paged_attention``; None if the operands are not of the expected kind."""
    native = library()
    tables = metadata.block_tables
    if native is None or not _known(q, cache, metadata):
        return None
    tokens, heads, head_dim = q.shape
    out = torch.empty((tokens, heads, head_dim), dtype=q.dtype)
    tiled = (
        q.dtype == torch.bfloat16
        and head_dim % TILE_DIMENSIONS == 0
        and head_dim <= LARGEST_TILED_HEAD
        and has_amx()
    )
    step = AttentionStep(
        q.data_ptr(),
        cache.keys.data_ptr(),
        cache.values.data_ptr(),
        None if cache.key_scales is None else cache.key_scales.data_ptr(),
        None if cache.value_scales is None else cache.value_scales.data_ptr(),
        tables.data_ptr(),
        metadata.context_lens.data_ptr(),
        metadata.query_start.data_ptr(),
        None if metadata.trees is None else metadata.trees.data_ptr(),
        out.data_ptr(),
        tables.stride(0),
        len(metadata.query_lens),
        heads,
        cache.num_kv_heads,
        cache.block_size,
        head_dim,
        q.stride(0),
        window,
        scale,
        soft_cap,
    )
    cache_code, threads = CACHE_CODES[cache.keys.dtype], torch.get_num_threads()
    if tiled:
        native.amx_attention(cache_code, ctypes.byref(step), threads)
        return out
    native.paged_attention(DTYPE_CODES[q.dtype], cache_code, ctypes.byref(step), threads)
    return out
