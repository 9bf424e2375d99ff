"""Attention of few new tokens over long contexts, the context split among programs.

One program takes a sequence, a key/value head and a stretch of the context; the rows of its matrix
products are the new tokens times the query heads that share the head, so that keys and values are
read once for all of them. Stretches are merged by their log-sum-exp afterwards (Flash-Decoding,
Dao et al. 2023).

Everything that changes between replays of a captured step is read on the device: context lengths,
tables, new tokens. The number of stretches is fixed by what capturing fixes, their length is not.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.layer_cache import LayerCache
from kernels.metadata import AttentionMetadata
from kernels.triton import tuning
from kernels.triton.attention_tile import (
    LOG2_E,
    add_values,
    factor_of,
    in_tree,
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
from kernels.triton.decode_tiles import LEAST_STRETCH, default_choice, problem_of, splits_of
from kernels.triton.runtime import facts_of
from kernels.triton.stretches import log_sum_of, store_merged, stretch_of

_PLAIN = tl.constexpr(PLAIN)


# Sizes that change from step to step must not make a new kernel of it.
@triton.jit(do_not_specialize=["table_stride", "splits", "window"])
def _decode_kernel(
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
    log_sums,
    q_stride,
    table_stride,
    kv_heads,
    splits,
    scale,
    window,
    soft_cap,
    GROUP: tl.constexpr,
    QUERY_LEN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KIND: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    TREES: tl.constexpr,
    SPLIT: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One stretch of one sequence's context for the query heads of one key/value head.

    Grid (sequences, kv heads, splits). COLUMNS is a power of two that holds a row of a tile:
    HEAD_DIM elements, or half as many pairs. `scale` and `soft_cap` include log2(e). If TREES,
    `trees` has each token's mask: which new ones of its sequence it sees. `out` holds attention, or
    if SPLIT float32 stretches [token, q head, split, Dh] with base-2 `log_sums`.
    """
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    context = tl.load(context_lens + sequence)
    if QUERY_LEN == 1:
        first_token = sequence
        new = 1
    else:
        first_token = tl.load(query_start + sequence)
        new = tl.load(query_start + sequence + 1) - first_token
    first = 0
    if WINDOWED:
        first = tl.maximum(context - new - window + 1, 0)
    begin, end = stretch_of(context, first, split, splits, BLOCK_N, LEAST)
    if SPLIT and begin >= end:
        return

    rows = tl.arange(0, BLOCK_M)
    token = rows // GROUP
    in_rows = token < new
    q_head = head * GROUP + rows % GROUP
    position = context - new + token
    columns = tl.arange(0, COLUMNS)
    width: tl.constexpr = HEAD_DIM if KIND == _PLAIN else HEAD_DIM // 2
    in_columns = columns < width
    q_rows = q + (first_token + token).to(tl.int64) * q_stride + q_head * HEAD_DIM
    q_mask = in_rows[:, None] & in_columns[None, :]
    missing = missing_factor(KIND, ASSEMBLY)
    queries, odd_queries, row_scale = load_queries(q_rows, q_mask, columns, scale * missing, KIND)
    factor = factor_of(row_scale, CAPPED)
    if TREES:
        tree = tl.load(trees + first_token + token, mask=in_rows, other=-1)

    offsets = tl.arange(0, BLOCK_N)
    table = tables + sequence.to(tl.int64) * table_stride
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    # Summed over its columns at the end: a sum inside the loop would make the warps meet.
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    odd_total = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    head_keys = keys + head * (BLOCK_SIZE * width)
    head_values = values + head * (BLOCK_SIZE * width)
    # Pages are looked up one tile ahead: otherwise every tile would wait for two loads in a row.
    pages = pages_of(table, begin, first, end, BLOCK_SIZE, BLOCK_N)
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        seen = start + offsets
        in_context = seen < end
        if WINDOWED:
            in_context &= seen >= first
        mask = in_context[:, None] & in_columns[None, :]
        key_rows = rows_of(head_keys, pages, start, kv_heads, width, BLOCK_SIZE, BLOCK_N)
        value_rows = rows_of(head_values, pages, start, kv_heads, width, BLOCK_SIZE, BLOCK_N)
        key_tile = tl.load(key_rows[:, None] + columns[None, :], mask=mask, other=0)
        key_scale = row_scale
        if KIND != _PLAIN:
            base = key_scales + head * BLOCK_SIZE
            key_scale_rows = rows_of(base, pages, start, kv_heads, 1, BLOCK_SIZE, BLOCK_N)
            key_scale = tl.load(key_scale_rows, mask=in_context, other=0.0)
            base = value_scales + head * BLOCK_SIZE
            value_scale_rows = rows_of(base, pages, start, kv_heads, 1, BLOCK_SIZE, BLOCK_N)
            value_scale = tl.load(value_scale_rows, mask=in_context, other=0.0)
        value_tile = tl.load(value_rows[:, None] + columns[None, :], mask=mask, other=0)
        pages = pages_of(table, start + BLOCK_N, first, end, BLOCK_SIZE, BLOCK_N)
        scores = scores_of(
            queries, odd_queries, key_tile, key_scale, row_scale, soft_cap, KIND, CAPPED, ASSEMBLY
        )
        visible = seen[None, :] <= position[:, None]
        if WINDOWED:
            visible &= seen[None, :] > position[:, None] - window
        if TREES:
            visible &= in_tree(tree, seen - (context - new))
        scores = tl.where(visible & in_context[None, :], scores, float("-inf"))
        if KIND == _PLAIN:
            weights, shrink, most = weights_of(scores, factor, most)
            sums = sums * shrink[:, None] + weights
        else:
            weights, counted, shrink, most = scaled_weights_of(scores, factor, most, value_scale)
            sums = sums * shrink[:, None] + counted
            odd_total *= shrink[:, None]
        total *= shrink[:, None]
        total, odd_total = add_values(weights, value_tile, total, odd_total, KIND, ASSEMBLY)

    summed = tl.sum(sums, 1)
    inverse = tl.where(summed > 0.0, missing / summed, 0.0)
    total *= inverse[:, None]
    odd_total *= inverse[:, None]
    q_heads = kv_heads * GROUP
    place = (first_token + token).to(tl.int64) * q_heads + q_head
    if SPLIT:
        place = place * splits + split
        tl.store(log_sums + place, log_sum_of(most, summed), mask=in_rows)
    store_rows(out + place * HEAD_DIM, in_rows, total, odd_total, KIND, HEAD_DIM)


@triton.jit(do_not_specialize=["splits", "window"])
def _merge_kernel(
    stretches,
    log_sums,
    context_lens,
    query_start,
    out,
    q_heads,
    splits,
    window,
    QUERY_LEN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    WINDOWED: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Weigh a query head's stretches by their sums. Grid (sequences, QUERY_LEN, q heads).

    Only the stretches that hold context were written; SPLITS is a power of two that holds all.
    """
    sequence = tl.program_id(0)
    token = tl.program_id(1)
    context = tl.load(context_lens + sequence)
    if QUERY_LEN == 1:
        first_token = sequence
        new = 1
    else:
        first_token = tl.load(query_start + sequence)
        new = tl.load(query_start + sequence + 1) - first_token
        if token >= new:
            return
    first = 0
    if WINDOWED:
        first = tl.maximum(context - new - window + 1, 0)
    each = tl.arange(0, SPLITS)
    begin, end = stretch_of(context, first, each, splits, BLOCK_N, LEAST)
    written = (each < splits) & (begin < end)
    place = ((first_token + token).to(tl.int64) * q_heads + tl.program_id(2)) * splits
    logs = tl.load(log_sums + place + each, mask=written, other=float("-inf"))
    parts = stretches + place * HEAD_DIM
    target = out + place // splits * HEAD_DIM
    store_merged(parts, logs, written, target, HEAD_DIM, COLUMNS)


def decode_attention(
    q: Tensor,
    cache: LayerCache,
    metadata: AttentionMetadata,
    scale: float,
    window: int,
    soft_cap: float,
    out: Tensor,
    splits: int = 0,
) -> None:
    """Attention of the leading ``num_decodes`` sequences into their tokens of ``out`` [T, Hq, Dh].

    Reads tensors of the device alone and the host's numbers that capturing fixes. `splits` forces
    a number of stretches.
    """
    facts = facts_of(q)
    problem = problem_of(q, cache, metadata)
    tiles = tuning.choice_for(problem, default_choice, facts).tiles
    heads, head_dim = q.shape[1:]
    kv_heads, block_size = cache.num_kv_heads, cache.block_size
    group, query_len = heads // kv_heads, metadata.decode_query_len
    sequences = metadata.num_decodes
    has_trees = metadata.trees is not None and query_len > 1  # a token alone sees itself
    longest = metadata.block_tables.shape[1] * block_size
    if window:
        longest = min(longest, window + query_len)
    if not splits:
        slots = facts.multiprocessors * max(1, tiles["resident"])
        splits = splits_of(sequences * kv_heads, longest, slots)
    kind = KINDS.get(cache.keys.dtype, PLAIN)
    target, log_sums = out, out
    if splits > 1:
        tokens = min(q.shape[0], sequences * query_len)
        target = torch.empty(
            (tokens, heads, splits, head_dim), dtype=torch.float32, device=q.device
        )
        log_sums = torch.empty((tokens, heads, splits), dtype=torch.float32, device=q.device)
    _decode_kernel[sequences, kv_heads, splits](
        q,
        words_of(cache.keys),
        words_of(cache.values),
        cache.key_scales,
        cache.value_scales,
        metadata.block_tables,
        metadata.context_lens,
        metadata.query_start,
        metadata.trees if has_trees else None,
        target,
        log_sums,
        q.stride(0),
        metadata.block_tables.stride(0),
        kv_heads,
        splits,
        scale * LOG2_E,
        window,
        soft_cap * LOG2_E,
        GROUP=group,
        QUERY_LEN=query_len,
        HEAD_DIM=head_dim,
        COLUMNS=columns_of(head_dim, kind),
        BLOCK_SIZE=block_size,
        KIND=kind,
        ASSEMBLY=assembly_for(kind, facts, q.device),
        WINDOWED=window > 0,
        CAPPED=soft_cap > 0,
        TREES=has_trees,
        SPLIT=splits > 1,
        LEAST=LEAST_STRETCH,
        BLOCK_M=problem.sizes[1],
        BLOCK_N=tiles["block_n"],
        STAGES=tiles["num_stages"],
        num_warps=tiles["num_warps"],
    )
    if splits > 1:
        _merge_kernel[sequences, query_len, heads](
            target,
            log_sums,
            metadata.context_lens,
            metadata.query_start,
            out,
            heads,
            splits,
            window,
            QUERY_LEN=query_len,
            HEAD_DIM=head_dim,
            COLUMNS=columns_of(head_dim, PLAIN),
            WINDOWED=window > 0,
            LEAST=LEAST_STRETCH,
            BLOCK_N=tiles["block_n"],
            SPLITS=triton.next_power_of_2(splits),
            num_warps=4,
        )
