"""Paged attention on a CPU: native kernels that read the pages where they lie."""

import torch
from torch import Tensor

from kernels import plain
from kernels.cpu.native import DTYPE_CODES, has_amx, library, takes
from kernels.layer_cache import LayerCache
from kernels.metadata import AttentionMetadata

LANES = 16  # the head dimension must fill whole vectors
TILE_DIMENSIONS = 32  # and, on AMX, whole tiles
LARGEST_TILED_HEAD = 256


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
    key_cache, value_cache = cache.keys, cache.values
    if window or soft_cap or cache.is_quantized:
        return None
    if native is None or not takes(q) or q.dim() != 3 or q.shape[2] % LANES:
        return None
    if not (q.stride(2) == 1 and q.stride(1) == q.shape[2]):
        return None
    if not (q.dtype == key_cache.dtype == value_cache.dtype):
        return None
    if not (key_cache.is_contiguous() and value_cache.is_contiguous()):
        return None
    tables = metadata.block_tables
    if tables.dtype != torch.int32 or tables.stride(-1) != 1:
        return None
    tokens, heads, head_dim = q.shape
    out = torch.empty((tokens, heads, head_dim), dtype=q.dtype)
    if (
        q.dtype == torch.bfloat16
        and head_dim % TILE_DIMENSIONS == 0
        and head_dim <= LARGEST_TILED_HEAD
        and has_amx()
    ):
        native.amx_attention(
            q.data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            tables.data_ptr(),
            tables.stride(0),
            metadata.context_lens.data_ptr(),
            metadata.query_start.data_ptr(),
            out.data_ptr(),
            len(metadata.query_lens),
            heads,
            key_cache.shape[1],
            key_cache.shape[2],
            head_dim,
            q.stride(0),
            scale,
            torch.get_num_threads(),
        )
        return out
    decodes = metadata.num_decodes
    if decodes:
        native.decode_attention(
            DTYPE_CODES[q.dtype],
            q.data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            tables.data_ptr(),
            tables.stride(0),
            metadata.context_lens.data_ptr(),
            out.data_ptr(),
            decodes,
            heads,
            key_cache.shape[1],
            key_cache.shape[2],
            head_dim,
            q.stride(0),
            scale,
            torch.get_num_threads(),
        )
    token = decodes
    for i in range(decodes, len(metadata.query_lens)):
        end = token + metadata.query_lens[i]
        out[token:end] = plain.prefill_attention(
            q[token:end], cache, tables[i], metadata.context_lens_list[i], scale
        )
        token = end
    return out
