"""One tile of keys and values in attention with a running maximum (FlashAttention-2, Dao 2023).

Scores are in units of log2: weights are powers of two. The scales of an 8-bit cache multiply
scores and weights, never elements.
"""

import math

import triton
import triton.language as tl

from kernels.triton.cached_values import PLAIN, unpack

LOG2_E = math.log2(math.e)  # what the scale of scores is multiplied by

_PLAIN = tl.constexpr(PLAIN)
_LEAST_SCALE = tl.constexpr(2.0**-100)


@triton.jit
def load_queries(rows, mask, columns, scale, KIND: tl.constexpr):
    """Queries as the products take them: (tile, its odd half, the factor of each row's scores).

    rows: pointers to heads [M]; mask [M, COLUMNS]. For 8-bit keys they are float16, whatever the
    model's type is: rows are brought to magnitude 1 first.
    """
    if KIND == _PLAIN:
        queries = tl.load(rows[:, None] + columns[None, :], mask=mask, other=0.0)
        odd_queries = queries
        row_scale = tl.zeros([rows.shape[0]], tl.float32) + scale
    else:
        even = tl.load(rows[:, None] + 2 * columns[None, :], mask=mask, other=0.0)
        odd = tl.load(rows[:, None] + 2 * columns[None, :] + 1, mask=mask, other=0.0)
        even, odd = even.to(tl.float32), odd.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(even), 1), tl.max(tl.abs(odd), 1))
        # Nothing to divide by in a row of zeros, and none so small that its inverse is infinite.
        largest = tl.where(largest > _LEAST_SCALE, largest, 1.0)
        queries = (even / largest[:, None]).to(tl.float16)
        odd_queries = (odd / largest[:, None]).to(tl.float16)
        row_scale = largest * scale
    return queries, odd_queries, row_scale


@triton.jit
def scores_of(
    queries,
    odd_queries,
    key_tile,
    key_scale,
    row_scale,
    soft_cap,
    KIND: tl.constexpr,
    CAPPED: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Scores [M, N] of keys [N, COLUMNS]; ``weights_of`` multiplies them by ``factor_of``."""
    if KIND == _PLAIN:
        scores = tl.dot(queries, key_tile.T, input_precision="ieee")
    else:
        even, odd = unpack(key_tile, KIND, ASSEMBLY)
        scores = tl.dot(odd_queries, odd.T, tl.dot(queries, even.T))
        scores *= key_scale[None, :]
    if CAPPED:
        # tanh(x) = 1 - 2 / (e^2x + 1), e^2x = 2^(2 log2(e) x); cap and scores both contain log2(e).
        scores = tl.exp2(scores * (row_scale * (2.8853900817779268 / soft_cap))[:, None])
        scores = soft_cap * (1.0 - 2.0 / (scores + 1.0))
    return scores


@triton.jit
def in_tree(tree, nth):
    """What masks [M] of 64 bits leave of new tokens [N]: [M, N]; all where `nth` has no bit."""
    bits = tree[:, None] >> tl.minimum(tl.maximum(nth, 0), 63).to(tl.int64)[None, :]
    return ((bits & 1) != 0) | (nth < 0)[None, :] | (nth > 63)[None, :]


@triton.jit
def factor_of(row_scale, CAPPED: tl.constexpr):
    """What brings scores to units of log2: the rows' scales, which a cap has already applied."""
    return tl.full(row_scale.shape, 1.0, tl.float32) if CAPPED else row_scale


@triton.jit
def taken_apart(value_scale):
    """Scales of values as 2^e m: (e as a float, m in [1, 2), 2^-e).

    2^e goes into the exponents of the weights before their maximum is taken, so that what is large
    in the end is large in float16. Scales below 2^-100 count as that: their values are zeros in
    all but name, and 2^-e stays finite.
    """
    bits = tl.maximum(value_scale, _LEAST_SCALE).to(tl.int32, bitcast=True)
    exponent = bits >> 23
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return (exponent - 127).to(tl.float32), mantissa, inverse


@triton.jit
def weights_of(scores, factor, most):
    """Powers of two below a running maximum: (weights [M, N], shrinkage of sums, maximum).

    The positive `factor` [M] multiplies scores together with the subtraction, in one instruction.
    Rows that have seen nothing yet have a maximum of -inf, and weights of 0.
    """
    highest = tl.maximum(most, tl.max(scores, 1) * factor)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(scores * factor[:, None] - base[:, None])
    return weights, tl.exp2(most - base), highest


@triton.jit
def scaled_weights_of(scores, factor, most, value_scale):
    """As ``weights_of`` for 8-bit values: (weights for values, for the sum, shrinkage, maximum)."""
    exponent, mantissa, inverse = taken_apart(value_scale)
    scores = scores * factor[:, None] + exponent[None, :]
    weights, shrink, most = weights_of(scores, tl.full(factor.shape, 1.0, tl.float32), most)
    return weights * mantissa[None, :], weights * inverse[None, :], shrink, most


@triton.jit
def add_values(weights, value_tile, total, odd_total, KIND: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Add weighted values [N, COLUMNS] to totals [M, COLUMNS]."""
    if KIND == _PLAIN:
        weights = weights.to(value_tile.dtype)
        total = tl.dot(weights, value_tile, total, input_precision="ieee")
    else:
        even, odd = unpack(value_tile, KIND, ASSEMBLY)
        weights = weights.to(tl.float16)
        total = tl.dot(weights, even, total)
        odd_total = tl.dot(weights, odd, odd_total)
    return total, odd_total


@triton.jit
def store_rows(rows, row_mask, total, odd_total, KIND: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Store totals to heads [M] of HEAD_DIM elements."""
    width: tl.constexpr = total.shape[1]
    if KIND == _PLAIN:
        columns = tl.arange(0, width)
        mask = row_mask[:, None] & (columns < HEAD_DIM)[None, :]
        tl.store(rows[:, None] + columns[None, :], total.to(rows.dtype.element_ty), mask=mask)
    else:
        columns = tl.arange(0, 2 * width)
        mask = row_mask[:, None] & (columns < HEAD_DIM)[None, :]
        both = tl.join(total, odd_total).reshape(total.shape[0], 2 * width)
        tl.store(rows[:, None] + columns[None, :], both.to(rows.dtype.element_ty), mask=mask)
