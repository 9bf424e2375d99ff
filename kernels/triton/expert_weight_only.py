"""Experts' weights of four or eight bits times activations of sixteen, widened in registers.

The product of ``weight_only_kernels`` for tiles of rows sorted by expert: every expert's weight is
in the same layout (``weight_only_layout``), one after the other.
"""

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from kernels.experts import StackedWeight
from kernels.triton import weight_only
from kernels.triton.expert_order import ExpertOrder
from kernels.triton.runtime import DeviceFacts
from kernels.triton.scaled_matmul import tile_of
from kernels.triton.tuning import Choice
from kernels.triton.weight_only_kernels import add_step
from kernels.triton.weight_only_unpack import table_words


# Numbers that change from step to step must not make a new kernel of it.
@triton.jit(do_not_specialize=["num_tiles"])
def expert_weight_only_kernel(
    x,
    data,
    scales,
    zeros,
    table,
    out,
    pairs,
    experts,
    rows,
    num_tiles,
    n,
    k,
    units,
    x_stride,
    scale_stride,
    zero_stride,
    table_stride,
    TOP_K: tl.constexpr,
    KIND: tl.constexpr,
    ZEROS: tl.constexpr,
    WORDS: tl.constexpr,
    HALF_SCALES: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    LANES: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One tile: rows of one expert, BLOCK_N of its outputs.

    Row ``pair // TOP_K`` of x [.., k] goes to row `pair` of `out` [pairs, n]. data is
    [E, units, n, QUARTER]; what one expert has of the others is as far apart as the strides say.
    """
    tile, tile_n = tile_of(tl.program_id(0), num_tiles, tl.cdiv(n, BLOCK_N), 8)
    held = tl.load(rows + tile)
    if held == 0:
        return
    expert = tl.load(experts + tile).to(tl.int64)
    row = tl.arange(0, BLOCK_M)
    # Rows that are not needed read the first's values, so that every address is one of x's.
    pair = tl.load(pairs + tile * BLOCK_M + tl.where(row < held, row, 0)).to(tl.int64)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column_ids = tl.minimum(columns, n - 1)
    WIDTH: tl.constexpr = BLOCK_K // LANES
    within = tl.arange(0, WIDTH)
    data += expert * units * n * (UNIT // LANES)
    data_tile = data + column_ids[:, None] * (UNIT // LANES) + within[None, :]
    x_tile = x + (pair // TOP_K)[None, :] * x_stride + within[:, None]
    scales += expert * scale_stride
    zeros += expert * zero_stride
    table += expert * table_stride
    words = table_words(table, x.dtype.element_ty) if KIND == 1 and not INTERPRETED else 0
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # With its own number of stages a loop loads ahead what no matrix instruction takes, too.
    for step in tl.range(0, units * (UNIT // BLOCK_K), num_stages=STAGES):
        acc = add_step(
            acc, step, x_tile, data_tile, scales, zeros, table, words, column_ids, within, n, k,
            KIND, ZEROS, WORDS, HALF_SCALES, GROUP, UNIT, LANES, EVEN_K, BLOCK_N, WIDTH,
            INTERPRETED,
        )  # fmt: skip
    if GROUP == 0:
        acc *= tl.load(scales + column_ids)[:, None]
    target = pair[None, :] * n + columns[:, None]
    stored = (row < held)[None, :] & (columns < n)[:, None]
    tl.store(out + target, acc.to(out.dtype.element_ty), mask=stored)


def tiles(block_m: int, columns: int, lanes: int, facts: DeviceFacts) -> list[dict[str, int]]:
    """Tiles that fit the device for weights whose units have `columns`, the sensible first."""
    shapes = [(64, 256, 4, 4), (64, 256, 4, 3), (64, 128, 4, 4), (128, 128, 8, 3), (128, 128, 4, 3)]
    if block_m > 32:
        shapes = [
            (128, 128, 8, 3),
            (128, 128, 8, 2),
            (64, 128, 8, 3),
            (128, 64, 8, 3),
            (64, 64, 8, 3),
        ]
    if facts.capability >= weight_only.TENSOR_MEMORY and block_m > 64:
        shapes = [shape for shape in shapes if shape[0] <= 64]
    found: list[dict[str, int]] = []
    for block_n, block_k, num_warps, num_stages in shapes:
        tile = {
            "block_n": block_n,
            "block_k": min(block_k, columns),
            "num_warps": num_warps,
            "num_stages": num_stages,
        }
        needed = weight_only.shared_memory({**tile, "block_m": block_m}, lanes)
        if needed <= facts.shared_memory - 4096 and tile not in found:
            found.append(tile)
    return found


def choices(block_m: int, columns: int, lanes: int, facts: DeviceFacts) -> list[Choice]:
    """What may be measured: every one of the tiles."""
    return [Choice("triton", tile) for tile in tiles(block_m, columns, lanes, facts)]


def unit_of(weight: StackedWeight) -> tuple[int, int]:
    """Columns of a unit and lanes of a container."""
    form = weight_only.form_of(weight.every)
    return form.units.columns, form.lanes


def multiply(
    x: Tensor,
    weight: StackedWeight,
    order: ExpertOrder,
    top_k: int,
    out: Tensor,
    tile: Mapping[str, int],
) -> None:
    """Each row of x times the weights of its experts, into out [T * top_k, N]."""
    form = weight_only.form_of(weight.every)
    _, n, k = weight.shape
    data, scales, zeros, table = weight_only.tensors_of(weight.every, form)
    count = len(order.experts)
    expert_weight_only_kernel[(count * triton.cdiv(n, tile["block_n"]),)](
        x,
        data,
        scales,
        zeros,
        table,
        out,
        order.pairs,
        order.experts,
        order.rows,
        count,
        n,
        k,
        form.units.total,
        x.stride(0),
        scales.stride(0),
        zeros.stride(0),
        table.stride(0),
        TOP_K=top_k,
        KIND=form.kind,
        ZEROS=form.zeros,
        WORDS=form.words,
        HALF_SCALES=form.half_scales,
        GROUP=form.group,
        UNIT=form.units.columns,
        LANES=form.lanes,
        EVEN_K=k % form.units.columns == 0,
        BLOCK_M=order.block_m,
        BLOCK_N=tile["block_n"],
        BLOCK_K=tile["block_k"],
        STAGES=tile["num_stages"],
        INTERPRETED=x.device.type == "cpu",
        num_warps=tile["num_warps"],
    )
