"""Loops over the tiles of a stretch of a paged context, for a tile of new tokens."""

import triton
import triton.language as tl

from kernels.triton.attention_tile import (
    add_values,
    factor_of,
    in_tree,
    scaled_weights_of,
    scores_of,
    weights_of,
)
from kernels.triton.cached_values import PLAIN, pages_of, rows_of

_PLAIN = tl.constexpr(PLAIN)


@triton.jit
def attend(
    begin,
    end,
    first,
    position,
    tree,
    first_new,
    queries,
    odd_queries,
    row_scale,
    keys,
    values,
    key_scales,
    value_scales,
    table,
    kv_heads,
    window,
    soft_cap,
    total,
    odd_total,
    sums,
    most,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KIND: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    TREES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Tiles [begin, end) of the context; not MASKED: every row sees all of them.

    If TREES, the masks `tree` [M] of 64 bits hide some of the positions from `first_new` on.
    """
    width: tl.constexpr = HEAD_DIM if KIND == _PLAIN else HEAD_DIM // 2
    offsets = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, COLUMNS)
    factor = factor_of(row_scale, CAPPED)
    pages = pages_of(table, begin, first, end, BLOCK_SIZE, BLOCK_N)
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        key_rows = rows_of(keys, pages, start, kv_heads, width, BLOCK_SIZE, BLOCK_N)
        value_rows = rows_of(values, pages, start, kv_heads, width, BLOCK_SIZE, BLOCK_N)
        key_scale = row_scale
        seen = start + offsets
        in_context = (seen >= first) & (seen < end)
        if MASKED:
            mask = in_context[:, None] & (columns < width)[None, :]
            key_tile = tl.load(key_rows[:, None] + columns[None, :], mask=mask, other=0)
            value_tile = tl.load(value_rows[:, None] + columns[None, :], mask=mask, other=0)
        elif width != COLUMNS:
            mask = (columns < width)[None, :]
            key_tile = tl.load(key_rows[:, None] + columns[None, :], mask=mask, other=0)
            value_tile = tl.load(value_rows[:, None] + columns[None, :], mask=mask, other=0)
        else:
            key_tile = tl.load(key_rows[:, None] + columns[None, :])
            value_tile = tl.load(value_rows[:, None] + columns[None, :])
        if KIND != _PLAIN:
            scale_rows = rows_of(key_scales, pages, start, kv_heads, 1, BLOCK_SIZE, BLOCK_N)
            key_scale = tl.load(scale_rows, mask=in_context, other=0.0)
            scale_rows = rows_of(value_scales, pages, start, kv_heads, 1, BLOCK_SIZE, BLOCK_N)
            value_scale = tl.load(scale_rows, mask=in_context, other=0.0)
        pages = pages_of(table, start + BLOCK_N, first, end, BLOCK_SIZE, BLOCK_N)
        scores = scores_of(
            queries, odd_queries, key_tile, key_scale, row_scale, soft_cap, KIND, CAPPED, ASSEMBLY
        )
        if MASKED:
            visible = seen[None, :] <= position[:, None]
            if WINDOWED:
                visible &= seen[None, :] > position[:, None] - window
            if TREES:
                visible &= in_tree(tree, seen - first_new)
            scores = tl.where(visible & in_context[None, :], scores, float("-inf"))
        if KIND == _PLAIN:
            weights, shrink, most = weights_of(scores, factor, most)
            sums = sums * shrink + tl.sum(weights, 1)
        else:
            weights, counted, shrink, most = scaled_weights_of(scores, factor, most, value_scale)
            sums = sums * shrink + tl.sum(counted, 1)
            odd_total *= shrink[:, None]
        total *= shrink[:, None]
        total, odd_total = add_values(weights, value_tile, total, odd_total, KIND, ASSEMBLY)
    return total, odd_total, sums, most


@triton.jit
def attend_overlapped(
    begin,
    end,
    queries,
    row_scale,
    keys,
    values,
    table,
    kv_heads,
    soft_cap,
    total,
    sums,
    most,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """As ``attend`` without masks: values are added one tile late.

    Where products are asynchronous (Hopper), the values' product of one tile then runs while the
    weights of the next are computed. Nothing but the loop may use its result, or it is waited for:
    so totals are shrunk one tile late as well. The first tile adds itself with weights of zero.
    Nor may a branch lead around this: ptxas would wait for every single instruction.
    """
    columns = tl.arange(0, COLUMNS)
    factor = factor_of(row_scale, CAPPED)
    pages = pages_of(table, begin, begin, end, BLOCK_SIZE, BLOCK_N)
    late_pages = pages_of(table, begin, begin, end, BLOCK_SIZE, BLOCK_N)
    weights = tl.zeros([queries.shape[0], BLOCK_N], tl.float32)
    shrink = tl.full([queries.shape[0]], 1.0, tl.float32)
    mask = (columns < HEAD_DIM)[None, :]
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        late_start = tl.maximum(start - BLOCK_N, begin)
        key_rows = rows_of(keys, pages, start, kv_heads, HEAD_DIM, BLOCK_SIZE, BLOCK_N)
        value_rows = rows_of(
            values, late_pages, late_start, kv_heads, HEAD_DIM, BLOCK_SIZE, BLOCK_N
        )
        if HEAD_DIM == COLUMNS:
            key_tile = tl.load(key_rows[:, None] + columns[None, :])
            value_tile = tl.load(value_rows[:, None] + columns[None, :])
        else:
            key_tile = tl.load(key_rows[:, None] + columns[None, :], mask=mask, other=0)
            value_tile = tl.load(value_rows[:, None] + columns[None, :], mask=mask, other=0)
        late_pages = pages_of(table, start, begin, end, BLOCK_SIZE, BLOCK_N)
        pages = pages_of(table, start + BLOCK_N, begin, end, BLOCK_SIZE, BLOCK_N)
        scores = scores_of(
            queries, queries, key_tile, row_scale, row_scale, soft_cap, _PLAIN, CAPPED, 0
        )
        total *= shrink[:, None]
        total = tl.dot(weights.to(queries.dtype), value_tile, total)
        weights, shrink, most = weights_of(scores, factor, most)
        sums = sums * shrink + tl.sum(weights, 1)
    total *= shrink[:, None]
    late_start = tl.maximum(end - BLOCK_N, begin)
    value_rows = rows_of(values, late_pages, late_start, kv_heads, HEAD_DIM, BLOCK_SIZE, BLOCK_N)
    mask = mask & (late_start + tl.arange(0, BLOCK_N) < end)[:, None]
    value_tile = tl.load(value_rows[:, None] + columns[None, :], mask=mask, other=0)
    total = tl.dot(weights.to(queries.dtype), value_tile, total)
    return total, sums, most
