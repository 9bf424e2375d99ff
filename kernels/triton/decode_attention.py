"""Attention of few new tokens over long contexts, the context split among programs.

One program takes a sequence, a key/value head and a stretch of the context; the rows of its matrix
products are the new tokens times the query heads that share the head, so that keys and values are
read once for all of them. Stretches are merged by their log-sum-exp afterwards (Flash-Decoding,
Dao et al. 2023).

Everything that changes between replays of a captured step is read on the device: context lengths,
tables, new tokens. The number of stretches is fixed by what capturing fixes, their length is not.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.layer_cache import LayerCache
from kernels.metadata import AttentionMetadata
from kernels.triton import tuning
from kernels.triton.cached_values import (
    E4M3_BITS_SCALE,
    INT8,
    KINDS,
    PLAIN,
    cap_scores,
    slots_of,
    unpack,
    words_of,
)
from kernels.triton.runtime import DeviceFacts, facts_of
from kernels.triton.tuning import Choice, Problem

LEAST_ROWS = 16  # of a matrix instruction
# Below it a stretch costs more by its start and its merge than by its bytes.
LEAST_STRETCH = 256
MOST_STRETCHES = 64
LOG2_E = math.log2(math.e)

_PLAIN = tl.constexpr(PLAIN)
_INT8 = tl.constexpr(INT8)
_LOWEST_SCALE = tl.constexpr(2.0**-100)


@triton.jit
def _stretch(context, first, split, splits, BLOCK_N: tl.constexpr, LEAST: tl.constexpr):
    """The positions [begin, end) of a stretch of the visible context [first, context)."""
    begin = first // BLOCK_N * BLOCK_N
    length = tl.maximum(tl.cdiv(context - begin, splits), LEAST)
    length = tl.cdiv(length, BLOCK_N) * BLOCK_N
    begin += split * length
    return begin, tl.minimum(begin + length, context)


@triton.jit
def _decode_kernel(
    q,
    keys,
    values,
    key_scales,
    value_scales,
    tables,
    context_lens,
    query_start,
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
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    SPLIT: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One stretch of one sequence's context for the query heads of one key/value head.

    Grid (sequences, kv heads, splits). COLUMNS is a power of two that holds a row of a tile:
    HEAD_DIM elements, or half as many pairs. `scale` and `soft_cap` include log2(e). `out` holds
    attention, or if SPLIT float32 stretches [token, q head, split, Dh] with base-2 `log_sums`.
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
    begin, end = _stretch(context, first, split, splits, BLOCK_N, LEAST)
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
    if KIND == _PLAIN:
        queries = tl.load(q_rows[:, None] + columns[None, :], mask=q_mask, other=0.0)
        row_scale = tl.zeros([BLOCK_M], tl.float32) + scale
    else:
        # float16 for the products, whatever the model's type: rows are brought to magnitude 1.
        even = tl.load(q_rows[:, None] + 2 * columns[None, :], mask=q_mask, other=0.0)
        odd = tl.load(q_rows[:, None] + 2 * columns[None, :] + 1, mask=q_mask, other=0.0)
        even, odd = even.to(tl.float32), odd.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(even), 1), tl.max(tl.abs(odd), 1))
        largest = tl.where(largest > 0.0, largest, 1.0)
        queries = (even / largest[:, None]).to(tl.float16)
        odd_queries = (odd / largest[:, None]).to(tl.float16)
        row_scale = largest * scale
        if KIND != _INT8:
            row_scale *= E4M3_BITS_SCALE

    offsets = tl.arange(0, BLOCK_N)
    table = tables + sequence.to(tl.int64) * table_stride
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    # Summed over its columns at the end: a sum inside the loop would make the warps meet.
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    odd_total = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    # Pages are looked up one tile ahead: otherwise every tile would wait for two loads in a row.
    seen = begin + offsets
    pages = tl.load(table + seen // BLOCK_SIZE, mask=(seen >= first) & (seen < end), other=0)
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        seen = start + offsets
        in_context = (seen >= first) & (seen < end)
        slots = slots_of(pages, seen, head, kv_heads, BLOCK_SIZE)
        following = seen + BLOCK_N
        pages = tl.load(table + following // BLOCK_SIZE, mask=following < end, other=0)
        tile = slots[:, None] * width + columns[None, :]
        mask = in_context[:, None] & in_columns[None, :]
        key_tile = tl.load(keys + tile, mask=mask, other=0)
        if KIND == _PLAIN:
            scores = tl.dot(queries, key_tile.T, input_precision="ieee")
            scores *= row_scale[:, None]
        else:
            even_keys, odd_keys = unpack(key_tile, KIND)
            scores = tl.dot(queries, even_keys.T)
            scores = tl.dot(odd_queries, odd_keys.T, scores)
            key_scale = tl.load(key_scales + slots, mask=in_context, other=0.0)
            scores *= row_scale[:, None] * key_scale[None, :]
        if CAPPED:
            scores = cap_scores(scores, soft_cap)
        visible = seen[None, :] <= position[:, None]
        if WINDOWED:
            visible &= seen[None, :] > position[:, None] - window
        visible &= in_context[None, :]
        scores = tl.where(visible, scores, float("-inf"))
        if KIND != _PLAIN:
            # A value's scale goes into the exponent, so that float16 holds what is large in the
            # end; the sum takes it out again.
            value_scale = tl.load(value_scales + slots, mask=in_context, other=0.0)
            value_scale = tl.maximum(value_scale, _LOWEST_SCALE)
            scores += tl.log2(value_scale)[None, :]
        highest = tl.maximum(most, tl.max(scores, 1))
        # Rows that have seen nothing yet: -inf minus -inf is not a number.
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(most - base)
        most = highest
        total *= shrink[:, None]
        value_tile = tl.load(values + tile, mask=mask, other=0)
        if KIND == _PLAIN:
            sums = sums * shrink[:, None] + weights
            total = tl.dot(weights.to(value_tile.dtype), value_tile, total, input_precision="ieee")
        else:
            sums = sums * shrink[:, None] + weights * (1.0 / value_scale)[None, :]
            odd_total *= shrink[:, None]
            even_values, odd_values = unpack(value_tile, KIND)
            weights16 = weights.to(tl.float16)
            total = tl.dot(weights16, even_values, total)
            odd_total = tl.dot(weights16, odd_values, odd_total)

    summed = tl.sum(sums, 1)
    inverse = tl.where(summed > 0.0, 1.0 / summed, 0.0)
    if KIND != _PLAIN and KIND != _INT8:
        inverse *= E4M3_BITS_SCALE
    total *= inverse[:, None]
    q_heads = kv_heads * GROUP
    place = (first_token + token).to(tl.int64) * q_heads + q_head
    if SPLIT:
        place = place * splits + split
        highest = most + tl.log2(summed)
        tl.store(log_sums + place, highest, mask=in_rows)
    target = out + place[:, None] * HEAD_DIM
    if KIND == _PLAIN:
        tl.store(target + columns[None, :], total.to(out.dtype.element_ty), mask=q_mask)
    else:
        odd_total *= inverse[:, None]
        both = tl.join(total, odd_total).reshape(BLOCK_M, 2 * COLUMNS)
        columns = tl.arange(0, 2 * COLUMNS)
        mask = in_rows[:, None] & (columns < HEAD_DIM)[None, :]
        tl.store(target + columns[None, :], both.to(out.dtype.element_ty), mask=mask)


@triton.jit
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
    begin, end = _stretch(context, first, each, splits, BLOCK_N, LEAST)
    written = (each < splits) & (begin < end)
    place = ((first_token + token).to(tl.int64) * q_heads + tl.program_id(2)) * splits
    logs = tl.load(log_sums + place + each, mask=written, other=float("-inf"))
    most = tl.max(logs, 0)
    most = tl.where(most == float("-inf"), 0.0, most)
    weights = tl.exp2(logs - most)
    whole = tl.sum(weights, 0)
    columns = tl.arange(0, COLUMNS)
    parts = tl.load(
        stretches + (place + each)[:, None] * HEAD_DIM + columns[None, :],
        mask=written[:, None] & (columns < HEAD_DIM)[None, :],
        other=0.0,
    )
    merged = tl.sum(parts * weights[:, None], 0) / tl.where(whole > 0.0, whole, 1.0)
    target = out + place // splits * HEAD_DIM + columns
    tl.store(target, merged.to(out.dtype.element_ty), mask=columns < HEAD_DIM)


def rows_of(query_len: int, group: int) -> int:
    """Rows of a program's matrix products."""
    return max(LEAST_ROWS, triton.next_power_of_2(query_len * group))


def problem_of(q: Tensor, cache: LayerCache, metadata: AttentionMetadata) -> Problem:
    """Sizes: head size, rows, page size, programs without splitting, and tokens a table holds."""
    group = q.shape[1] // cache.num_kv_heads
    sizes = (
        q.shape[2],
        rows_of(metadata.decode_query_len, group),
        cache.block_size,
        tuning.round_rows(metadata.num_decodes * cache.num_kv_heads),
        tuning.round_rows(metadata.block_tables.shape[1] * cache.block_size),
    )
    return Problem("decode_attention", sizes, (str(q.dtype), str(cache.keys.dtype)))


def splits_of(programs: int, longest: int, slots: int) -> int:
    """Into how many stretches contexts of at most `longest` tokens are split.

    `programs` are there without splitting, `slots` run at a time. The fewest stretches are taken
    whose waves of programs are about as full as any number's.
    """
    most = max(1, min(MOST_STRETCHES, longest // LEAST_STRETCH))
    full = [programs * n / (-(-programs * n // slots) * slots) for n in range(1, most + 1)]
    return next(n for n, part in enumerate(full, 1) if part >= 0.9 * max(full))


def default_choice(problem: Problem, _facts: DeviceFacts) -> Choice:
    """Tiles that keep two or more programs on a multiprocessor, each with loads in flight."""
    head_dim, rows, _, _, _ = problem.sizes
    width = triton.next_power_of_2(head_dim)
    wide = "float32" in problem.dtypes[1]
    block_n = 32 if wide or width > 128 or rows > 32 else 64
    return Choice(
        "triton",
        {"block_n": block_n, "num_warps": 4, "num_stages": 1 if wide else 3, "waves": 2},
    )


def choices(problem: Problem, facts: DeviceFacts) -> list[Choice]:
    """Tiles of 32 to 128 tokens, two to four stages of loads in flight."""
    return [default_choice(problem, facts)]


tuning.announce("decode_attention", choices)


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
    longest = metadata.block_tables.shape[1] * block_size
    if window:
        longest = min(longest, window + query_len)
    if not splits:
        slots = facts.multiprocessors * tiles["waves"]
        splits = splits_of(sequences * kv_heads, longest, slots)
    kind = KINDS.get(cache.keys.dtype, PLAIN)
    columns = triton.next_power_of_2(head_dim)
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
        COLUMNS=columns if kind == PLAIN else columns // 2,
        BLOCK_SIZE=block_size,
        KIND=kind,
        WINDOWED=window > 0,
        CAPPED=soft_cap > 0,
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
            COLUMNS=columns,
            WINDOWED=window > 0,
            LEAST=LEAST_STRETCH,
            BLOCK_N=tiles["block_n"],
            SPLITS=triton.next_power_of_2(splits),
            num_warps=4,
        )
