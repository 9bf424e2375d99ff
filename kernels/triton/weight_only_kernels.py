"""Products of x with weights that are widened in registers, and weights widened in memory.

The weight's tile [BLOCK_N, BLOCK_K] is the first operand of the matrix instructions and x's the
second, so that a tile has as few columns as there are rows of x, and what is widened goes from
registers into the product. Each group of columns is summed apart and scaled in float32, so that the
operands are small integers and exact. Layouts: ``weight_only_layout``.
"""

import triton
import triton.language as tl

from kernels.triton.weight_only_unpack import (
    factor,
    looked_up,
    table_words,
    unpacked,
    value_of,
)


@triton.jit
def scale_of(params, PART: tl.constexpr, WORDS: tl.constexpr, HALF_SCALES: tl.constexpr):
    """Scales in float32 from what is stored: float32, or one half of a word of two."""
    if not WORDS:
        return params
    else:  # noqa: RET505 - what follows a return is compiled, a branch not taken is not
        bits = ((params >> 16) if PART == 1 else params).to(tl.int16)
        return bits.to(tl.float16 if HALF_SCALES else tl.bfloat16, bitcast=True).to(tl.float32)


@triton.jit
def add_step(
    acc,
    step,
    x_tile,
    data_tile,
    scales,
    zeros,
    table,
    words,
    row,
    column,
    N,
    K,
    KIND: tl.constexpr,
    ZEROS: tl.constexpr,
    WORDS: tl.constexpr,
    HALF_SCALES: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    LANES: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """acc [BLOCK_N, BLOCK_M] and the product of the columns in one step's containers.

    x_tile and data_tile point to the first step's operands, [WIDTH, BLOCK_M] and [BLOCK_N, WIDTH];
    row are the tile's outputs, column those of its containers. words: of a table that is looked up.
    """
    QUARTER: tl.constexpr = UNIT // LANES  # containers of a unit
    STEPS: tl.constexpr = QUARTER // WIDTH
    # Lanes that share a group, and groups of a unit.
    WHOLE: tl.constexpr = GROUP == 0 or GROUP % UNIT == 0
    PARTS: tl.constexpr = GROUP != 0 and UNIT % max(GROUP, 1) == 0
    SHARING: tl.constexpr = LANES if WHOLE else (GROUP // QUARTER if PARTS else 1)
    LOOK_UP: tl.constexpr = KIND == 1 and not INTERPRETED
    dtype: tl.constexpr = x_tile.dtype.element_ty
    unit = step // STEPS
    offset = (step % STEPS) * WIDTH
    containers = tl.load(data_tile + (unit.to(tl.int64) * N * QUARTER + offset))
    if LOOK_UP:
        entries = looked_up(containers, words, dtype)
    for part in tl.static_range(LANES // SHARING):
        if GROUP == 0:
            params = row  # there are none, and nothing reads them
        else:
            group = (unit * UNIT + part * SHARING * QUARTER) // GROUP
            if WORDS and ZEROS == 0:
                # Two groups of a unit share a word.
                params = tl.load(scales + (group // 2) * N + row)
            else:
                params = tl.load(scales + group * N + row)
            scale = scale_of(params, part % 2 if ZEROS == 0 else 0, WORDS, HALF_SCALES)
            scale *= factor(KIND, ZEROS, dtype, INTERPRETED)
        if ZEROS == 2:
            shift = tl.load(zeros + group * N + row)
            spread = tl.broadcast_to(shift[:, None], (BLOCK_N, WIDTH))
        elif ZEROS == 0:
            spread = containers
        else:
            spread = tl.broadcast_to(params[:, None], (BLOCK_N, WIDTH))
        for i in tl.static_range(SHARING):
            start = unit * UNIT + (part * SHARING + i) * QUARTER + offset
            if EVEN_K:
                rows_of_x = tl.load(x_tile + start)
            else:
                inside = (start + column < K)[:, None]
                rows_of_x = tl.load(x_tile + start, mask=inside, other=0.0)
            if LOOK_UP:
                w = entries[part * SHARING + i]
            else:
                w = unpacked(
                    containers,
                    spread,
                    table,
                    part * SHARING + i,
                    KIND,
                    ZEROS,
                    dtype,
                    INTERPRETED,
                )
            if GROUP == 0:
                acc = tl.dot(w, rows_of_x, acc)
            elif i == 0:
                product = tl.dot(w, rows_of_x)
            else:
                product = tl.dot(w, rows_of_x, product)
        if GROUP != 0:
            acc += product * scale[:, None]
    return acc


# Numbers that change from step to step must not make a new kernel of it.
@triton.jit(do_not_specialize=["M", "tiles_m", "units_per_split"])
def weight_only_kernel(
    x,
    data,
    scales,
    zeros,
    table,
    bias,
    out,
    M,
    N,
    K,
    units,
    stride_x,
    tiles_m,
    units_per_split,
    KIND: tl.constexpr,
    ZEROS: tl.constexpr,
    WORDS: tl.constexpr,
    HALF_SCALES: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    LANES: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One tile of ``x @ w.T``, or of a split's share of it; out [splits, M, N] contiguous.

    x [M, K] with `stride_x` between rows. `units` of UNIT columns lie along K, LANES to a
    container. GROUP 0: one scale for a row, float32 [N].
    """
    program = tl.program_id(0)
    split = tl.program_id(1)
    first_n = (program // tiles_m) * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)
    # Rows beyond the last read the last again: loads without masks.
    row = tl.minimum(n, N - 1)
    m = (program % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    WIDTH: tl.constexpr = BLOCK_K // LANES
    STEPS: tl.constexpr = UNIT // BLOCK_K
    column = tl.arange(0, WIDTH)
    data_tile = data + row[:, None] * (UNIT // LANES) + column[None, :]
    x_tile = x + tl.minimum(m, M - 1)[None, :].to(tl.int64) * stride_x + column[:, None]
    words = table_words(table, x.dtype.element_ty) if KIND == 1 and not INTERPRETED else 0
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    begin = split * units_per_split
    end = tl.minimum(begin + units_per_split, units)
    for step in tl.range(begin * STEPS, end * STEPS, num_stages=STAGES):
        acc = add_step(
            acc, step, x_tile, data_tile, scales, zeros, table, words, row, column, N, K,
            KIND, ZEROS, WORDS, HALF_SCALES, GROUP, UNIT, LANES, EVEN_K, BLOCK_N, WIDTH,
            INTERPRETED,
        )  # fmt: skip
    if GROUP == 0:
        acc *= tl.load(scales + row)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias + row).to(tl.float32)[:, None]
    place = (split * M + m).to(tl.int64)[:, None] * N + n[None, :]
    valid = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out + place, tl.trans(acc).to(out.dtype.element_ty), mask=valid)


@triton.jit
def merge_kernel(
    partial,
    bias,
    out,
    size,
    N,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [M, N] = the sum of partial [SPLITS, M, N] in the order of splits, plus bias [N]."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    # Not a conversion: a size of 1 is a constant, which has none.
    stride = tl.full((), size, tl.int64)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial + split * stride + at, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + at % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def widen_kernel(
    data,
    scales,
    zeros,
    table,
    out,
    N,
    K,
    KIND: tl.constexpr,
    ZEROS: tl.constexpr,
    WORDS: tl.constexpr,
    HALF_SCALES: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out [N, K] = the weight, one unit of columns of BLOCK_N rows in a program."""
    unit = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1)
    QUARTER: tl.constexpr = UNIT // LANES
    column = tl.arange(0, QUARTER)
    place = (unit.to(tl.int64) * N + row)[:, None] * QUARTER + column[None, :]
    containers = tl.load(data + place)
    for LANE in tl.static_range(LANES):
        value = value_of(containers, LANE, KIND, table)
        group = 0
        if GROUP != 0:
            group = (unit * UNIT + LANE * QUARTER) // GROUP
        if GROUP != 0 and WORDS and ZEROS == 0:
            params = tl.load(scales + (group // 2) * N + row)
            low, high = (
                scale_of(params, 0, WORDS, HALF_SCALES),
                scale_of(params, 1, WORDS, HALF_SCALES),
            )
            scale = tl.where(group % 2 == 0, low, high)
        else:
            params = tl.load(scales + group * N + row)
            scale = scale_of(params, 0, WORDS, HALF_SCALES)
        if ZEROS == 1:
            value -= (params >> 16).to(tl.float32)[:, None]
        elif ZEROS == 2:
            value -= tl.load(zeros + group * N + row)[:, None]
        elif KIND == 0:
            value -= 8.0
        k = unit * UNIT + LANE * QUARTER + column
        inside = (n < N)[:, None] & (k < K)[None, :]
        value = (value * scale[:, None]).to(out.dtype.element_ty)
        tl.store(out + n[:, None].to(tl.int64) * K + k[None, :], value, mask=inside)
