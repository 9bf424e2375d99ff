"""Causal attention of many new tokens over paged contexts (FlashAttention-2, Dao 2023).

One program takes a tile of new tokens and all query heads that share a key/value head: its rows are
tokens times heads, so that short chunks fill a tile and a tile's diagonal is short. Where that
leaves a device underfilled, as a short chunk after a long prefix does, contexts are split among
programs, whose stretches are merged afterwards (Flash-Decoding, Dao et al. 2023).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.layer_cache import LayerCache
from kernels.metadata import AttentionMetadata
from kernels.triton import tuning
from kernels.triton.attention_tile import LOG2_E, load_queries, store_rows
from kernels.triton.cached_values import (
    KINDS,
    PLAIN,
    assembly_for,
    columns_of,
    missing_factor,
    words_of,
)
from kernels.triton.prefill_loops import attend, attend_overlapped
from kernels.triton.prefill_tiles import LEAST_STRETCH, default_choice, problem_of, splits_for
from kernels.triton.runtime import facts_of
from kernels.triton.stretches import log_sum_of, store_merged, stretch_of

LEAST_MERGED = 16  # stretches, as Triton sees it: one merge kernel for all fewer ones

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
def _place_of(token, q_head, q_heads, split, splits, SPLIT: tl.constexpr):
    """Where a query head's row is in [token, q head], or if SPLIT in [token, q head, split]."""
    place = token.to(tl.int64) * q_heads + q_head
    if SPLIT:
        place = place * splits + split
    return place


# Sizes that change from step to step must not make a new kernel of it.
@triton.jit(do_not_specialize=["table_stride", "first_sequence", "sequences", "window", "splits"])
def _prefill_kernel(
    q,
    keys,
    values,
    key_scales,
    value_scales,
    tables,
    context_lens,
    query_start,
    trees,
    out,
    q_stride,
    table_stride,
    kv_heads,
    first_sequence,
    sequences,
    scale,
    window,
    soft_cap,
    log_sums,
    splits,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KIND: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    TREES: tl.constexpr,
    OVERLAPPED: tl.constexpr,
    SPLIT: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A tile of BLOCK_M // GROUP tokens of the sequences from `first_sequence` on.

    Grid (tiles, kv heads, splits). Tiles run from the last to the first: the long ones of a prompt
    come first, and the short ones fill the gaps that are left at the end. Tiles of one head run
    together, so that its keys and values stay in the L2 cache. Other arguments as in decoding, but
    that stretches and `log_sums` begin with the first token of `first_sequence`, and that those
    without context have sums of 2^-inf.
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
    tree = token
    if TREES:
        # Nor do tiles of new tokens, unless every row sees all that came before it.
        tree = tl.load(trees + first_token + token, mask=in_rows, other=-1)
        hides = tl.min(tl.where(tree == -1, 1, 0), 0) == 0
        full = tl.where(hides, tl.minimum(full, (context - new) // BLOCK_N * BLOCK_N), full)
    first = 0
    begin = 0
    if WINDOWED:
        first = tl.maximum(lowest - window + 1, 0)
        begin = first // BLOCK_N * BLOCK_N
    first_row = first_token
    split = 0
    if SPLIT:
        split = tl.program_id(2)
        begin, end = stretch_of(end, first, split, splits, BLOCK_N, LEAST)
        full = tl.minimum(full, end)
        first_row = first_token - tl.load(query_start + first_sequence)
    if SPLIT and begin >= end:
        place = _place_of(first_row + token, q_head, kv_heads * GROUP, split, splits, SPLIT)
        tl.store(log_sums + place, float("-inf"), mask=in_rows)
        return
    if WINDOWED:
        # And those that the last row sees from their first position need none on the left.
        inside = tl.cdiv(tl.maximum(highest - window + 1, 0), BLOCK_N) * BLOCK_N
        inside = tl.minimum(inside, tl.cdiv(end, BLOCK_N) * BLOCK_N)
        if SPLIT:
            inside = tl.maximum(inside, begin)
        total, odd_total, sums, most = attend(
            begin, tl.minimum(inside, end), first, position, tree, context - new,
            queries, odd_queries, row_scale,
            head_keys, head_values, key_scales, value_scales, table, kv_heads,
            window, soft_cap, total, odd_total, sums, most,
            HEAD_DIM, COLUMNS, BLOCK_SIZE, KIND, ASSEMBLY, True, True, CAPPED, False,
            BLOCK_N, STAGES,
        )  # fmt: skip
        begin = inside
    full = tl.maximum(full, begin)
    if OVERLAPPED:
        total, sums, most = attend_overlapped(
            begin, full, queries, row_scale, head_keys, head_values, table, kv_heads,
            soft_cap, total, sums, most,
            HEAD_DIM, COLUMNS, BLOCK_SIZE, CAPPED, BLOCK_N, STAGES,
        )  # fmt: skip
    else:
        total, odd_total, sums, most = attend(
            begin, full, first, position, tree, context - new,
            queries, odd_queries, row_scale,
            head_keys, head_values, key_scales, value_scales, table, kv_heads,
            window, soft_cap, total, odd_total, sums, most,
            HEAD_DIM, COLUMNS, BLOCK_SIZE, KIND, ASSEMBLY, False, False, CAPPED, False,
            BLOCK_N, STAGES,
        )  # fmt: skip
    total, odd_total, sums, most = attend(
        full, end, first, position, tree, context - new,
        queries, odd_queries, row_scale,
        head_keys, head_values, key_scales, value_scales, table, kv_heads,
        window, soft_cap, total, odd_total, sums, most,
        HEAD_DIM, COLUMNS, BLOCK_SIZE, KIND, ASSEMBLY, True, WINDOWED, CAPPED, TREES,
        BLOCK_N, STAGES,
    )  # fmt: skip

    inverse = tl.where(sums > 0.0, missing / sums, 0.0)
    total *= inverse[:, None]
    odd_total *= inverse[:, None]
    place = _place_of(first_row + token, q_head, kv_heads * GROUP, split, splits, SPLIT)
    if SPLIT:
        tl.store(log_sums + place, log_sum_of(most, sums), mask=in_rows)
    store_rows(out + place * HEAD_DIM, in_rows, total, odd_total, KIND, HEAD_DIM)


@triton.jit(do_not_specialize=["splits"])
def _merge_kernel(
    stretches,
    log_sums,
    out,
    splits,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Weigh a query head's stretches by their sums. Grid (tokens, q heads).

    Those with sums of 2^-inf were not written; SPLITS is a power of two that holds all.
    """
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    each = tl.arange(0, SPLITS)
    logs = tl.load(log_sums + row * splits + each, mask=each < splits, other=float("-inf"))
    parts = stretches + row * splits * HEAD_DIM
    store_merged(parts, logs, logs > float("-inf"), out + row * HEAD_DIM, HEAD_DIM, COLUMNS)


def prefill_attention(
    q: Tensor,
    cache: LayerCache,
    metadata: AttentionMetadata,
    scale: float,
    window: int,
    soft_cap: float,
    out: Tensor,
    splits: int = 0,
) -> None:
    """Attention of the sequences after the decodes into their tokens of ``out`` [T, Hq, Dh].

    `splits` forces a number of stretches.
    """
    facts = facts_of(q)
    problem = problem_of(q, cache, metadata)
    tiles = tuning.choice_for(problem, default_choice, facts).tiles
    heads, head_dim = q.shape[1:]
    kv_heads = cache.num_kv_heads
    group = heads // kv_heads
    chunks = metadata.query_lens[metadata.num_decodes :]
    # As `_sequence_of` counts them.
    grid = sum(chunks) // (tiles["block_m"] // group) + len(chunks)
    splits = splits or splits_for(problem, tiles, metadata, heads, kv_heads, window, facts)
    kind = KINDS.get(cache.keys.dtype, PLAIN)
    target, log_sums = out, out
    if splits > 1:
        shape = (sum(chunks), heads, splits)
        target = torch.empty((*shape, head_dim), dtype=torch.float32, device=q.device)
        log_sums = torch.empty(shape, dtype=torch.float32, device=q.device)
    _prefill_kernel[grid, kv_heads, splits](
        q,
        words_of(cache.keys),
        words_of(cache.values),
        cache.key_scales,
        cache.value_scales,
        metadata.block_tables,
        metadata.context_lens,
        metadata.query_start,
        metadata.trees,
        target,
        q.stride(0),
        metadata.block_tables.stride(0),
        kv_heads,
        metadata.num_decodes,
        len(metadata.query_lens),
        scale * LOG2_E,
        window,
        soft_cap * LOG2_E,
        log_sums,
        splits,
        GROUP=group,
        HEAD_DIM=head_dim,
        COLUMNS=columns_of(head_dim, kind),
        BLOCK_SIZE=cache.block_size,
        KIND=kind,
        ASSEMBLY=assembly_for(kind, facts, q.device),
        WINDOWED=window > 0,
        CAPPED=soft_cap > 0,
        TREES=metadata.trees is not None,
        OVERLAPPED=kind == PLAIN and bool(tiles["overlapped"]),
        SPLIT=splits > 1,
        LEAST=LEAST_STRETCH,
        BLOCK_M=tiles["block_m"],
        BLOCK_N=tiles["block_n"],
        STAGES=tiles["num_stages"],
        num_warps=tiles["num_warps"],
    )
    if splits > 1:
        _merge_kernel[sum(chunks), heads](
            target,
            log_sums,
            out[sum(metadata.query_lens[: metadata.num_decodes]) :],
            splits,
            HEAD_DIM=head_dim,
            COLUMNS=columns_of(head_dim, PLAIN),
            SPLITS=max(LEAST_MERGED, triton.next_power_of_2(splits)),
            num_warps=4,
        )
