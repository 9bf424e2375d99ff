"""Attention over paged caches: decodes and prefill chunks by their kernels, into one output."""

import torch
from torch import Tensor

from kernels.layer_cache import LayerCache
from kernels.metadata import AttentionMetadata
from kernels.triton.cached_values import KINDS, PLAIN, columns_of
from kernels.triton.decode_attention import decode_attention
from kernels.triton.decode_tiles import product_rows
from kernels.triton.prefill_attention import prefill_attention
from kernels.triton.runtime import FLOATS

LEAST_HEAD, LARGEST_HEAD, HEAD_MULTIPLE = 16, 256, 16
LEAST_BLOCK = 8
MOST_ROWS = 128  # of a program: a token's query heads of one key/value head, or of all decoded
MOST_ELEMENTS = 128 * 128  # of those rows: more do not fit the shared memory of every device


def _known(q: Tensor, cache: LayerCache, metadata: AttentionMetadata) -> bool:
    """Whether sizes, dtypes and strides are those that the kernels read."""
    if q.dim() != 3 or q.dtype not in FLOATS:
        return False
    head_dim, block_size = q.shape[2], cache.block_size
    if not LEAST_HEAD <= head_dim <= LARGEST_HEAD or head_dim % HEAD_MULTIPLE:
        return False
    group = q.shape[1] // cache.num_kv_heads
    rows = product_rows(max(1, metadata.decode_query_len if metadata.num_decodes else 1), group)
    if rows > MOST_ROWS or rows * columns_of(head_dim, PLAIN) > MOST_ELEMENTS:
        return False
    if not (q.stride(2) == 1 and q.stride(1) == head_dim):
        return False
    keys, values = cache.keys, cache.values
    if block_size < LEAST_BLOCK or block_size & (block_size - 1):
        return False
    if not (keys.is_contiguous() and values.is_contiguous() and keys.dtype == values.dtype):
        return False
    if cache.key_scales is None or cache.value_scales is None:
        if keys.dtype != q.dtype:
            return False
    else:
        scales = cache.key_scales, cache.value_scales
        if keys.dtype not in KINDS or not all(
            s.dtype == torch.float32 and s.is_contiguous() for s in scales
        ):
            return False
    tables, trees = metadata.block_tables, metadata.trees
    if trees is not None and not (trees.dtype == torch.int64 and trees.is_contiguous()):
        return False
    return (
        tables.dtype == metadata.context_lens.dtype == metadata.query_start.dtype == torch.int32
        and tables.stride(-1) == 1
    )


def paged_attention(
    q: Tensor,
    cache: LayerCache,
    metadata: AttentionMetadata,
    scale: float,
    window: int,
    soft_cap: float,
) -> Tensor | None:
    """As ``ops.paged_attention``; None if the operands are not of the expected kind.

    Sequences of context 0 (a captured step's padding) get zeros. Nothing but decodes may be
    captured: how many prefill tiles there are is read from the host's lists.
    """
    if not _known(q, cache, metadata):
        return None
    tokens, heads, head_dim = q.shape
    # A captured step of several tokens a sequence may have tokens that belong to none.
    make = torch.empty if metadata.decode_query_len == 1 else torch.zeros
    out = make((tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    if metadata.num_decodes:
        decode_attention(q, cache, metadata, scale, window, soft_cap, out)
    if metadata.num_decodes < len(metadata.query_lens):
        prefill_attention(q, cache, metadata, scale, window, soft_cap, out)
    return out
