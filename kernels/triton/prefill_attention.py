"""Causal attention of many new tokens over paged contexts (FlashAttention-2, Dao 2023).

One program takes a tile of new tokens and all query heads that share a key/value head: its rows are
tokens times heads, so that short chunks fill a tile and a tile's diagonal is short.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from kernels.layer_cache import LayerCache
from kernels.metadata import AttentionMetadata
from kernels.triton import tuning
from kernels.triton.attention_tile import (
    add_values,
    factor_of,
    load_queries,
    scaled_weights_of,
    scores_of,
    store_rows,
    weights_of,
)
from kernels.triton.cached_values import (
    KINDS,
    PLAIN,
    assembly_for,
    columns_of,
    missing_factor,
    pages_of,
    rows_of,
    words_of,
)
from kernels.triton.prefill_tiles import default_choice, problem_of
from kernels.triton.runtime import facts_of

LOG2_E = math.log2(math.e)

_PLAIN = tl.constexpr(PLAIN)


@triton.jit
def _sequence_of(tile, query_start, first_sequence, sequences, TOKENS: tl.constexpr):
    """The sequence of a tile and its tile within it.

    A sequence's tiles begin at (its first token) / TOKENS + (its number), counted from
    `first_sequence` on: never too few, at most one too many, and known without a sum.
    """
    origin = tl.load(query_start + first_sequence)
    low = first_sequence
    high = sequences
    while high - low > 1:
        middle = (low + high) // 2
        begins = (tl.load(query_start + middle) - origin) // TOKENS + middle - first_sequence
        low = tl.where(begins <= tile, middle, low)
        high = tl.where(begins <= tile, high, middle)
    begins = (tl.load(query_start + low) - origin) // TOKENS + low - first_sequence
    return low, tile - begins


@triton.jit
def _attend(
    begin,
    end,
    first,
    position,
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
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Tiles [begin, end) of the context; not MASKED: every row sees all of them."""
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
def _attend_overlapped(
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
    """As ``_attend`` without masks: values are added one tile late.

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


# Sizes that change from step to step must not make a new kernel of it.
@triton.jit(do_not_specialize=["table_stride", "first_sequence", "sequences", "window"])
def _prefill_kernel(
    q,
    keys,
    values,
    key_scales,
    value_scales,
    tables,
    context_lens,
    query_start,
    out,
    q_stride,
    table_stride,
    kv_heads,
    first_sequence,
    sequences,
    scale,
    window,
    soft_cap,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KIND: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    OVERLAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A tile of BLOCK_M // GROUP tokens of the sequences from `first_sequence` on.

    Grid (tiles, kv heads). Tiles run from the last to the first: the long ones of a prompt come
    first, and the short ones fill the gaps that are left at the end. Tiles of one head run
    together, so that its keys and values stay in the L2 cache. Other arguments as in decoding.
    """
    tokens: tl.constexpr = BLOCK_M // GROUP
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    sequence, tile = _sequence_of(tile, query_start, first_sequence, sequences, tokens)
    first_token = tl.load(query_start + sequence)
    new = tl.load(query_start + sequence + 1) - first_token
    if tile * tokens >= new:
        return
    context = tl.load(context_lens + sequence)
    rows = tl.arange(0, BLOCK_M)
    token = tile * tokens + rows // GROUP
    in_rows = (rows < tokens * GROUP) & (token < new)
    q_head = head * GROUP + rows % GROUP
    position = context - new + token
    lowest = context - new + tile * tokens
    highest = tl.minimum(lowest + tokens, context) - 1
    columns = tl.arange(0, COLUMNS)
    width: tl.constexpr = HEAD_DIM if KIND == _PLAIN else HEAD_DIM // 2
    q_rows = q + (first_token + token).to(tl.int64) * q_stride + q_head * HEAD_DIM
    q_mask = in_rows[:, None] & (columns < width)[None, :]
    missing = missing_factor(KIND, ASSEMBLY)
    queries, odd_queries, row_scale = load_queries(q_rows, q_mask, columns, scale * missing, KIND)

    table = tables + sequence.to(tl.int64) * table_stride
    head_keys = keys + head * (BLOCK_SIZE * width)
    head_values = values + head * (BLOCK_SIZE * width)
    if KIND != _PLAIN:
        key_scales += head * BLOCK_SIZE
        value_scales += head * BLOCK_SIZE
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    odd_total = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    end = highest + 1
    # Whole tiles that the first row sees to their last position need no mask on the right.
    full = (lowest + 1) // BLOCK_N * BLOCK_N
    first = 0
    begin = 0
    if WINDOWED:
        first = tl.maximum(lowest - window + 1, 0)
        begin = first // BLOCK_N * BLOCK_N
        # And those that the last row sees from their first position need none on the left.
        inside = tl.cdiv(tl.maximum(highest - window + 1, 0), BLOCK_N) * BLOCK_N
        inside = tl.minimum(inside, tl.cdiv(end, BLOCK_N) * BLOCK_N)
        total, odd_total, sums, most = _attend(
            begin, tl.minimum(inside, end), first, position,
            queries, odd_queries, row_scale,
            head_keys, head_values, key_scales, value_scales, table, kv_heads,
            window, soft_cap, total, odd_total, sums, most,
            HEAD_DIM, COLUMNS, BLOCK_SIZE, KIND, ASSEMBLY, True, True, CAPPED, BLOCK_N, STAGES,
        )  # fmt: skip
        begin = inside
    full = tl.maximum(full, begin)
    if OVERLAPPED:
        total, sums, most = _attend_overlapped(
            begin, full, queries, row_scale, head_keys, head_values, table, kv_heads,
            soft_cap, total, sums, most,
            HEAD_DIM, COLUMNS, BLOCK_SIZE, CAPPED, BLOCK_N, STAGES,
        )  # fmt: skip
    else:
        total, odd_total, sums, most = _attend(
            begin, full, first, position,
            queries, odd_queries, row_scale,
            head_keys, head_values, key_scales, value_scales, table, kv_heads,
            window, soft_cap, total, odd_total, sums, most,
            HEAD_DIM, COLUMNS, BLOCK_SIZE, KIND, ASSEMBLY, False, False, CAPPED, BLOCK_N, STAGES,
        )  # fmt: skip
    total, odd_total, sums, most = _attend(
        full, end, first, position,
        queries, odd_queries, row_scale,
        head_keys, head_values, key_scales, value_scales, table, kv_heads,
        window, soft_cap, total, odd_total, sums, most,
        HEAD_DIM, COLUMNS, BLOCK_SIZE, KIND, ASSEMBLY, True, WINDOWED, CAPPED, BLOCK_N, STAGES,
    )  # fmt: skip

    inverse = tl.where(sums > 0.0, missing / sums, 0.0)
    total *= inverse[:, None]
    odd_total *= inverse[:, None]
    place = (first_token + token).to(tl.int64) * (kv_heads * GROUP) + q_head
    store_rows(out + place * HEAD_DIM, in_rows, total, odd_total, KIND, HEAD_DIM)


def prefill_attention(
    q: Tensor,
    cache: LayerCache,
    metadata: AttentionMetadata,
    scale: float,
    window: int,
    soft_cap: float,
    out: Tensor,
) -> None:
    """Attention of the sequences after the decodes into their tokens of ``out`` [T, Hq, Dh]."""
    facts = facts_of(q)
    problem = problem_of(q, cache, metadata)
    tiles = tuning.choice_for(problem, default_choice, facts).tiles
    heads, head_dim = q.shape[1:]
    kv_heads = cache.num_kv_heads
    group = heads // kv_heads
    chunks = metadata.query_lens[metadata.num_decodes :]
    # As `_sequence_of` counts them.
    grid = sum(chunks) // (tiles["block_m"] // group) + len(chunks)
    kind = KINDS.get(cache.keys.dtype, PLAIN)
    _prefill_kernel[grid, kv_heads](
        q,
        words_of(cache.keys),
        words_of(cache.values),
        cache.key_scales,
        cache.value_scales,
        metadata.block_tables,
        metadata.context_lens,
        metadata.query_start,
        out,
        q.stride(0),
        metadata.block_tables.stride(0),
        kv_heads,
        metadata.num_decodes,
        len(metadata.query_lens),
        scale * LOG2_E,
        window,
        soft_cap * LOG2_E,
        GROUP=group,
        HEAD_DIM=head_dim,
        COLUMNS=columns_of(head_dim, kind),
        BLOCK_SIZE=cache.block_size,
        KIND=kind,
        ASSEMBLY=assembly_for(kind, facts, q.device),
        WINDOWED=window > 0,
        CAPPED=soft_cap > 0,
        OVERLAPPED=kind == PLAIN and bool(tiles["overlapped"]),
        BLOCK_M=tiles["block_m"],
        BLOCK_N=tiles["block_n"],
        STAGES=tiles["num_stages"],
        num_warps=tiles["num_warps"],
    )
