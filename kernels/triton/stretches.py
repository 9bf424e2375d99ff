"""Contexts split into stretches, each a program's, and merged (Flash-Decoding, Dao et al. 2023)."""

import triton
import triton.language as tl


@triton.jit
def stretch_of(context, first, split, splits, BLOCK_N: tl.constexpr, LEAST: tl.constexpr):
    """The positions [begin, end) of a stretch of the visible context [first, context).

    Stretches are whole tiles of BLOCK_N positions, and of LEAST positions or more: the last ones
    may be left with none.
    """
    begin = first // BLOCK_N * BLOCK_N
    length = tl.maximum(tl.cdiv(context - begin, splits), LEAST)
    length = tl.cdiv(length, BLOCK_N) * BLOCK_N
    begin += split * length
    return begin, tl.minimum(begin + length, context)


@triton.jit
def log_sum_of(most, sums):
    """log2 of the sums of weights that are relative to 2^most; -inf of nothing seen."""
    return most + tl.log2(tl.where(sums > 0.0, sums, 1.0))


@triton.jit
def store_merged(
    stretches, log_sums, written, target, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr
):
    """Store the stretches of one query head, weighed by their sums, to `target`.

    stretches: pointer to float32 rows of HEAD_DIM, one each; log_sums [SPLITS] in base 2, -inf for
    those that are not `written` [SPLITS], which are not read.
    """
    most = tl.max(log_sums, 0)
    most = tl.where(most == float("-inf"), 0.0, most)
    weights = tl.exp2(log_sums - most)
    whole = tl.sum(weights, 0)
    each = tl.arange(0, written.shape[0])
    columns = tl.arange(0, COLUMNS)
    parts = tl.load(
        stretches + each[:, None] * HEAD_DIM + columns[None, :],
        mask=written[:, None] & (columns < HEAD_DIM)[None, :],
        other=0.0,
    )
    merged = tl.sum(parts * weights[:, None], 0) / tl.where(whole > 0.0, whole, 1.0)
    tl.store(target + columns, merged.to(target.dtype.element_ty), mask=columns < HEAD_DIM)
