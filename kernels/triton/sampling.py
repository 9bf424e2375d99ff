"""Tokens drawn from logits after temperature, min-p, top-k and top-p, without asking the host.

Two launches. The first reads every logit once and leaves the largest logit and the mass of each
part (128 columns) of a row. The second has one program a row: the parts' maxima bound the filters'
threshold from below, since k parts with a maximum of at least t hold k logits of at least t, so
that only the few parts that reach the bound are read again, by a search with three pivots at once.
A flat row, or one of ties, makes every part a candidate: slower, never wrong.

Weights are float32, ``exp2((logit - maximum) * log2(e) / temperature)``, their sums float64. What
is kept is decided by comparing logits: equal logits are kept or dropped together.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_PARTS = 2048
LEAST_PART = 128
PARTS_AT_ONCE = 32
DRAW_WARPS = 16

# The number of low bits that are zero in the float32 form of each type: the search skips them.
ZERO_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}

# Stands for plus infinity, and for the maximum of a row without any number: distances from it are
# numbers. A power of two, so that it has as many zero bits as any 16-bit float.
_LARGE = tl.constexpr(2.0**127)

# Candidate parts that are too many for nothing but a round of comparisons.
SPARE_PARTS = tl.constexpr(8)


@triton.jit
def _numbers(values):
    """Logits as float32 without NaN and plus infinity."""
    values = values.to(tl.float32)
    values = tl.where(values == values, values, float("-inf"))
    return tl.minimum(values, _LARGE)


@triton.jit
def _weights(values, maximum, scale):
    return tl.exp2((values - maximum) * scale)


@triton.jit
def _order(value):
    """Integers in the order of floats: the bits, those of negative numbers negated."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits).to(tl.int64)


@triton.jit
def _value(order):
    """The float at this place of the order."""
    small = order.to(tl.int32)
    bits = tl.where(small < 0, -small | (-2147483647 - 1), small)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _pivots(low, high):
    """Three places in [low, high) that part it about evenly."""
    step = tl.maximum((high - low) // 4, 1)
    last = high - 1
    return (
        tl.minimum(low + step, last),
        tl.minimum(low + 2 * step, last),
        tl.minimum(low + 3 * step, last),
    )


@triton.jit
def _narrowed(bound, low, high, at_low, at_high, p1, p2, p3, f1, f2, f3):
    """The part of [low, high) in which a falling function crosses the bound."""
    new_low = tl.where(f3 >= bound, p3, tl.where(f2 >= bound, p2, tl.where(f1 >= bound, p1, low)))
    new_at_low = tl.where(
        f3 >= bound, f3, tl.where(f2 >= bound, f2, tl.where(f1 >= bound, f1, at_low))
    )
    new_high = tl.where(f1 < bound, p1, tl.where(f2 < bound, p2, tl.where(f3 < bound, p3, high)))
    new_at_high = tl.where(
        f1 < bound, f1, tl.where(f2 < bound, f2, tl.where(f3 < bound, f3, at_high))
    )
    return new_low, new_high, new_at_low, new_at_high


@triton.jit
def _candidates(row, listed, count, begin, columns, TILE: tl.constexpr, PART: tl.constexpr):
    """Logits [TILE, PART] of listed parts from `begin` on; minus infinity beyond the end."""
    i = begin + tl.arange(0, TILE)
    part = tl.load(listed + i, mask=i < count, other=0)
    at = part[:, None] * PART + tl.arange(0, PART)[None, :]
    inside = (i < count)[:, None] & (at < columns)
    return _numbers(tl.load(row + at, mask=inside, other=float("-inf")))


@triton.jit
def _mass_above(
    row, listed, count, columns, least, maximum, scale, TILE: tl.constexpr, PART: tl.constexpr
):
    mass = tl.zeros((), tl.float64)
    for begin in range(0, count, TILE):
        values = _candidates(row, listed, count, begin, columns, TILE, PART)
        weights = _weights(values, maximum, scale).to(tl.float64)
        mass += tl.sum(tl.where(values >= least, weights, 0.0))
    return mass


@triton.jit
def _threshold(
    row,
    listed,
    count,
    columns,
    bound,
    low,
    high,
    maximum,
    scale,
    COUNTING: tl.constexpr,
    ZEROS: tl.constexpr,
    TILE: tl.constexpr,
    PART: tl.constexpr,
):
    """The highest place in [low, high) from which on the candidates reach `bound` together.

    They are counted, or their weights summed. Ends as soon as no two of them lie between.
    """
    at_low = tl.full((), float("inf"), tl.float64)
    at_high = tl.zeros((), tl.float64)
    lightest = tl.zeros((), tl.float64)
    while (high - low > 1) & (at_low - at_high > 1.5 * lightest):
        p1, p2, p3 = _pivots(low, high)
        v1, v2, v3 = _value(p1 << ZEROS), _value(p2 << ZEROS), _value(p3 << ZEROS)
        f1 = tl.zeros((), tl.float64)
        f2 = tl.zeros((), tl.float64)
        f3 = tl.zeros((), tl.float64)
        for begin in range(0, count, TILE):
            values = _candidates(row, listed, count, begin, columns, TILE, PART)
            if COUNTING:
                f1 += tl.sum((values >= v1).to(tl.int32)).to(tl.float64)
                f2 += tl.sum((values >= v2).to(tl.int32)).to(tl.float64)
                f3 += tl.sum((values >= v3).to(tl.int32)).to(tl.float64)
            else:
                weights = _weights(values, maximum, scale).to(tl.float64)
                f1 += tl.sum(tl.where(values >= v1, weights, 0.0))
                f2 += tl.sum(tl.where(values >= v2, weights, 0.0))
                f3 += tl.sum(tl.where(values >= v3, weights, 0.0))
        low, high, at_low, at_high = _narrowed(
            bound, low, high, at_low, at_high, p1, p2, p3, f1, f2, f3
        )
        if COUNTING:
            lightest = tl.full((), 1.0, tl.float64)
        else:
            lightest = _weights(_value(low << ZEROS), maximum, scale).to(tl.float64)
    return low


@triton.jit
def _first_above(masses, indices, target, SIZE: tl.constexpr):
    """The first index at which the running sum exceeds the target, and the sum before it.

    Where rounding leaves none it is the last that has any mass, and 0 where nothing has.
    """
    sums = tl.cumsum(masses, 0)
    first = tl.min(tl.where((sums > target) & (masses > 0.0), indices, SIZE))
    last = tl.maximum(tl.max(tl.where(masses > 0.0, indices, -1)), 0)
    chosen = tl.where(first < SIZE, first, last)
    return chosen, tl.sum(tl.where(indices < chosen, masses, 0.0))


@triton.jit
def _parts_kernel(
    logits,
    parameters,
    maxima,
    masses,
    stride,
    columns,
    parts,
    TILE: tl.constexpr,
    PART: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    at = i[:, None] * PART + tl.arange(0, PART)[None, :]
    values = _numbers(tl.load(logits + row * stride + at, mask=at < columns, other=float("-inf")))
    scale = tl.load(parameters + row).to(tl.float32)
    maximum = tl.maximum(tl.max(values, 1), -_LARGE)
    mass = tl.sum(_weights(values, maximum[:, None], scale).to(tl.float64), 1)
    tl.store(maxima + row * parts + i, maximum, mask=i < parts)
    tl.store(masses + row * parts + i, mass, mask=i < parts)


@triton.jit(do_not_specialize=["rows"])
def _draw_kernel(
    logits,
    parameters,
    maxima,
    masses,
    listed,
    tokens,
    stride,
    columns,
    parts,
    rows,
    ZEROS: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
    PART: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    maxima += row * parts
    masses += row * parts
    listed += row * parts
    scale = tl.load(parameters + row).to(tl.float32)
    reach = tl.load(parameters + rows + row)
    top_k = tl.load(parameters + 2 * rows + row)
    top_p = tl.load(parameters + 3 * rows + row)
    uniform = tl.load(parameters + 4 * rows + row)

    i = tl.arange(0, PARTS)
    largest = tl.load(maxima + i, mask=i < parts, other=-_LARGE)
    maximum = tl.max(largest)
    factor = _weights(largest, maximum, scale).to(tl.float64)
    mass = tl.load(masses + i, mask=i < parts, other=0.0) * factor
    total = tl.sum(mass)

    has_k = top_k < columns
    has_p = top_p < 1.0
    has_floor = reach > float("-inf")
    filtered = has_k | has_p | has_floor
    threshold = tl.full((), float("-inf"), tl.float32)
    if filtered:
        high = (_order(maximum) >> ZEROS) + 1
        low = _order(tl.full((), -_LARGE, tl.float32)) >> ZEROS
        if has_floor:
            floor = maximum.to(tl.float64) + reach
            rounded = floor.to(tl.float32)
            place = _order(rounded) + (rounded.to(tl.float64) < floor).to(tl.int64)
            low = (place + ((1 << ZEROS) - 1)) >> ZEROS
        if has_k | (has_p & (reach == float("-inf"))):
            # All that weigh less than (1 - top_p) * total / columns are no more than 1 - top_p.
            share = ((1.0 - top_p) * total * 0.99 / columns).to(tl.float32)
            lightest_kept = maximum + tl.log2(share) / scale
            low = tl.where(has_k, low, tl.maximum(low, _order(lightest_kept) >> ZEROS))
            # What the parts' maxima reach together, all logits do.
            tally = tl.where(i < parts, tl.where(has_k, 1.0, factor), 0.0)
            bound = tl.where(has_k, top_k, top_p * total)
            at_low = tl.sum(tally)
            if at_low >= bound:
                least = tl.min(tl.where(i < parts, largest, _LARGE))
                low_part = _order(least) >> ZEROS
                high_part = high
                at_high = tl.zeros((), tl.float64)
                lightest = tl.zeros((), tl.float64)
                # A bound needs no precision: a few parts too many cost less than another round.
                while (high_part - low_part > 1) & (at_low - at_high > lightest * SPARE_PARTS):
                    p1, p2, p3 = _pivots(low_part, high_part)
                    f1 = tl.sum(tl.where(largest >= _value(p1 << ZEROS), tally, 0.0))
                    f2 = tl.sum(tl.where(largest >= _value(p2 << ZEROS), tally, 0.0))
                    f3 = tl.sum(tl.where(largest >= _value(p3 << ZEROS), tally, 0.0))
                    low_part, high_part, at_low, at_high = _narrowed(
                        bound, low_part, high_part, at_low, at_high, p1, p2, p3, f1, f2, f3
                    )
                    lightest = _weights(_value(low_part << ZEROS), maximum, scale).to(tl.float64)
                    lightest = tl.where(has_k, 1.0, lightest)
                low = tl.maximum(low, low_part)
        candidate = (i < parts) & (largest >= _value(low << ZEROS))
        count = tl.sum(candidate.to(tl.int32))
        place_in_list = tl.cumsum(candidate.to(tl.int32), 0) - 1
        tl.store(listed + place_in_list, i, mask=candidate)
        # Other threads of this program read the list; and the masses are overwritten below.
        tl.debug_barrier()
        if has_k:
            low = _threshold(
                logits, listed, count, columns, top_k, low, high, maximum, scale,
                True, ZEROS, TILE, PART,
            )  # fmt: skip
        if has_p:
            kept = total
            if has_k | has_floor:
                kept = _mass_above(
                    logits, listed, count, columns, _value(low << ZEROS), maximum, scale, TILE, PART
                )
            low = _threshold(
                logits, listed, count, columns, top_p * kept, low, high, maximum, scale,
                False, ZEROS, TILE, PART,
            )  # fmt: skip
        threshold = _value(low << ZEROS)
        for begin in range(0, count, TILE):
            j = begin + tl.arange(0, TILE)
            values = _candidates(logits, listed, count, begin, columns, TILE, PART)
            weights = _weights(values, maximum, scale).to(tl.float64)
            kept_mass = tl.sum(tl.where(values >= threshold, weights, 0.0), 1)
            tl.store(masses + j, kept_mass, mask=j < count)
        tl.debug_barrier()
        mass = tl.load(masses + i, mask=i < count, other=0.0)
        total = tl.sum(mass)

    target = uniform * total
    part, before = _first_above(mass, i, target, PARTS)
    if filtered:
        part = tl.load(listed + part)
    within = tl.arange(0, PART)
    at = part * PART + within
    values = _numbers(tl.load(logits + at, mask=at < columns, other=float("-inf")))
    weights = tl.where(values >= threshold, _weights(values, maximum, scale), 0.0)
    chosen, _ = _first_above(weights.to(tl.float64), within, target - before, PART)
    tl.store(tokens + row, (part * PART + chosen).to(tl.int64))


@triton.jit(do_not_specialize=["count"])
def _change_kernel(logits, places, factors, amounts, count, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    place = tl.load(places + i, mask=inside, other=0)
    factor = tl.load(factors + i, mask=inside, other=1.0)
    amount = tl.load(amounts + i, mask=inside, other=0.0)
    value = tl.load(logits + place, mask=inside, other=0.0)
    changed = tl.where(value > 0, tl.div_rn(value, factor), value * factor) - amount
    changed = tl.where(amount == float("inf"), float("-inf"), changed)
    tl.store(logits + place, changed, mask=inside)


def draw(
    logits: Tensor,
    parameters: Tensor,
    part: int | None = None,
    parts_at_once: int = PARTS_AT_ONCE,
) -> Tensor | None:
    """A token for each row; see ``kernels.sampling.draw_packed``.

    `part` columns have one maximum, `parts_at_once` of them are searched together; both are powers
    of two. Returns None, having done nothing, for logits of another type or without unit stride.
    """
    if logits.dtype not in ZERO_BITS or logits.stride(1) != 1 or not logits.numel():
        return None
    rows, columns = logits.shape
    if part is None:
        part = max(LEAST_PART, triton.next_power_of_2(triton.cdiv(columns, MOST_PARTS)))
    parts = triton.cdiv(columns, part)
    device = logits.device
    maxima = torch.empty(rows, parts, dtype=torch.float32, device=device)
    masses = torch.empty(rows, parts, dtype=torch.float64, device=device)
    listed = torch.empty(rows, parts, dtype=torch.int32, device=device)
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    _parts_kernel[(triton.cdiv(parts, parts_at_once), rows)](
        logits,
        parameters,
        maxima,
        masses,
        logits.stride(0),
        columns,
        parts,
        TILE=parts_at_once,
        PART=part,
        num_warps=4,
    )
    _draw_kernel[(rows,)](
        logits,
        parameters,
        maxima,
        masses,
        listed,
        tokens,
        logits.stride(0),
        columns,
        parts,
        rows,
        ZEROS=ZERO_BITS[logits.dtype],
        PARTS=triton.next_power_of_2(parts),
        TILE=parts_at_once,
        PART=part,
        num_warps=DRAW_WARPS,
    )
    return tokens


def change_logits(logits: Tensor, places: Tensor, factors: Tensor, amounts: Tensor) -> None:
    """Change single logits in place; see ``kernels.sampling.change_logits``."""
    count = places.numel()
    if count:
        block = 256
        _change_kernel[(triton.cdiv(count, block),)](
            logits, places, factors, amounts, count, BLOCK=block
        )
