"""Matmuls of a mixture of experts: tiles of rows sorted by expert, each with its expert's weight.

Rows are gathered by the loads and scattered by the stores, so that nothing is copied in between.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.experts import HALVES, StackedWeight
from kernels.triton import expert_weight_only, tuning, weight_only
from kernels.triton.expert_order import ExpertOrder, order_by_expert
from kernels.triton.fp8_linear import HAS_E4M3, round_by_scale
from kernels.triton.quantize_rows import quantize_rows
from kernels.triton.runtime import FLOATS, DeviceFacts, facts_of
from kernels.triton.scaled_matmul import product, tile_of
from kernels.triton.tuning import Choice, Problem
from kernels.weights import DenseWeight, Fp8Weight, Int8Weight


# Numbers that change from step to step must not make a new kernel of it.
@triton.jit(do_not_specialize=["num_tiles"])
def expert_matmul_kernel(
    x,
    x_scales,
    w,
    w_scales,
    out,
    pairs,
    experts,
    rows,
    num_tiles,
    n,
    k,
    x_stride,
    x_scale_stride,
    x_block_stride,
    x_expert_stride,
    SCALED: tl.constexpr,
    WIDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    SWAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One tile: rows of one expert, BLOCK_N of its outputs.

    Row ``pair // TOP_K`` of x [.., k] goes to row `pair` of `out` [pairs, n]; w [E, n, k] is of x's
    dtype. Where SCALED both have scales: w by channel [E, n] (COLUMNS 0) or by blocks of ROWS x
    COLUMNS [E, n / ROWS, k / COLUMNS], x by rows and blocks as far apart as the strides say. With
    WIDEN columns are counted in int16 of two codes.
    """
    tile, tile_n = tile_of(tl.program_id(0), num_tiles, tl.cdiv(n, BLOCK_N), GROUP)
    held = tl.load(rows + tile)
    if held == 0:
        return
    expert = tl.load(experts + tile).to(tl.int64)
    row = tl.arange(0, BLOCK_M)
    # Rows that are not needed read the first's values, so that every address is one of x's.
    place = tile * BLOCK_M + tl.where(row < held, row, 0)
    pair = tl.load(pairs + place).to(tl.int64)
    source = pair // TOP_K
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column_ids = tl.minimum(columns, n - 1)
    offsets = tl.arange(0, BLOCK_K)
    read_rows = x + source[:, None] * x_stride + offsets[None, :]
    read_columns = w + (expert * n + column_ids)[:, None] * k + offsets[None, :]
    row_scales = x_scales + source * x_scale_stride + expert * x_expert_stride
    INTEGERS: tl.constexpr = x.dtype.element_ty == tl.int8
    ONE: tl.constexpr = ROWS % BLOCK_N == 0
    if COLUMNS > 0:
        blocks = tl.cdiv(k, COLUMNS)
        if ONE:
            column_scales = (expert * tl.cdiv(n, ROWS) + tile_n * BLOCK_N // ROWS) * blocks
        else:
            column_scales = (expert * tl.cdiv(n, ROWS) + column_ids // ROWS) * blocks
    KIND: tl.constexpr = tl.int32 if INTEGERS else tl.float32
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), KIND)
    for at in tl.range(0, k, BLOCK_K, num_stages=STAGES):
        if EVEN_K:
            a = tl.load(read_rows + at)
            b = tl.load(read_columns + at)
        else:
            inside = (at + offsets < k)[None, :]
            a = tl.load(read_rows + at, mask=inside, other=0.0)
            b = tl.load(read_columns + at, mask=inside, other=0.0)
        if COLUMNS > 0:
            by_row = tl.load(row_scales + (at // COLUMNS) * x_block_stride)
            by_column = tl.load(w_scales + column_scales + at // COLUMNS)
            sums = product(a, b, None, SWAP, WIDEN, INTERPRETED)
            if ONE:
                by_row = by_row * by_column
            else:
                sums *= by_column[:, None] if SWAP else by_column[None, :]
            acc += sums * (by_row[None, :] if SWAP else by_row[:, None])
        elif SCALED and not INTEGERS and not WIDEN:
            acc += product(a, b, None, SWAP, WIDEN, INTERPRETED)
        else:
            acc = product(a, b, acc, SWAP, WIDEN, INTERPRETED)
    sums = acc.to(tl.float32)
    if SCALED and COLUMNS == 0:
        by_row = tl.load(row_scales)
        sums *= by_row[None, :] if SWAP else by_row[:, None]
        by_column = tl.load(w_scales + expert * n + columns, mask=columns < n, other=0.0)
        sums *= by_column[:, None] if SWAP else by_column[None, :]
    if SWAP:
        target = pair[None, :] * n + columns[:, None]
        stored = (row < held)[None, :] & (columns < n)[:, None]
    else:
        target = pair[:, None] * n + columns[None, :]
        stored = (row < held)[:, None] & (columns < n)[None, :]
    tl.store(out + target, sums.to(out.dtype.element_ty), mask=stored)


@triton.jit
def _sum_kernel(by_choice, weights, out, n, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """The weighted sum of one token's choices, in order."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(TOP_K):
        pair = token * TOP_K + choice
        values = tl.load(by_choice + pair * n + column, mask=inside, other=0.0).to(tl.float32)
        total += values * tl.load(weights + pair)
    tl.store(out + token * n + column, total.to(out.dtype.element_ty), mask=inside)


def rows_of_tiles(num_pairs: int, num_experts: int) -> int:
    """Rows of a tile: about as many as an expert gets, from 16 to 128."""
    return min(128, max(16, tuning.round_rows(-(-num_pairs // num_experts))))


def _tiles(problem: Problem, facts: DeviceFacts) -> dict[str, int]:
    block_m, columns = problem.sizes[0], problem.sizes[4]
    swap = block_m <= 64
    wide = {"int8": 128, "e4m3": 128, "codes": 128, "torch.float32": 32}
    block_k = wide.get(problem.dtypes[-1], 64)
    return {
        "swap": int(swap),
        "block_n": 64 if swap else 128,
        "block_k": _least(2 * block_k if swap and block_m <= 32 else block_k, columns),
        "num_warps": 4 if swap else 8,
        "num_stages": 4 if facts.shared_memory >= 160_000 and swap else 3,
    }


def _least(block_k: int, columns: int) -> int:
    return min(block_k, columns) if columns else block_k


def default_choice(problem: Problem, facts: DeviceFacts) -> Choice:
    """Tiles as for an ordinary product: the weight is the tall operand where rows are few."""
    if problem.kernel == WEIGHT_ONLY:
        return choices(problem, facts)[0]
    return Choice("triton", _tiles(problem, facts))


def choices(problem: Problem, facts: DeviceFacts) -> list[Choice]:
    """Tiles worth measuring that fit the device's shared memory."""
    block_m, columns = problem.sizes[0], problem.sizes[4]
    if problem.kernel == WEIGHT_ONLY:
        return expert_weight_only.choices(block_m, columns, problem.sizes[6], facts)
    start = _tiles(problem, facts)
    changes: list[dict[str, int]] = [{}, {"num_stages": 3}, {"num_stages": 5}]
    if start["swap"]:
        changes += [
            {"block_n": 128},
            {"block_n": 128, "num_stages": 3},
            {"block_k": start["block_k"] * 2, "num_stages": 3},
            {"block_k": start["block_k"] // 2, "num_stages": 6},
        ]
    else:
        changes += [
            {"num_stages": 4},
            {"block_n": 256, "num_stages": 3},
            {"block_n": 64, "num_warps": 4},
            {"block_k": start["block_k"] // 2, "num_stages": 5},
        ]
    size = {"int8": 1, "e4m3": 1, "codes": 1, "torch.float32": 4}.get(problem.dtypes[-1], 2)
    found: list[Choice] = []
    for change in changes:
        tile = {**start, **change}
        tile["block_k"] = _least(tile["block_k"], columns)
        stage = (block_m + tile["block_n"]) * tile["block_k"] * size
        choice = Choice("triton", tile)
        fits = stage * tile["num_stages"] <= facts.shared_memory - 2048
        if fits and tile["block_k"] >= 32 and choice not in found:
            found.append(choice)
    return found


KERNEL, WEIGHT_ONLY = "expert_linear", "expert_weight_only"
for kernel in (KERNEL, WEIGHT_ONLY):
    tuning.announce(kernel, choices)


def takes(weight: StackedWeight, dtype: torch.dtype) -> bool:
    """Whether rows of `dtype` can be multiplied; weights that are only stored small want halves."""
    if isinstance(weight.every, DenseWeight):
        return weight.every.data.dtype == dtype and dtype in FLOATS
    return dtype in (HALVES if weight_only.takes(weight.every) else FLOATS)


def _rounded(x: Tensor, weight: StackedWeight, chosen: Tensor) -> tuple[Tensor, Tensor | None]:
    """Activations as the weight's format wants them, and their scales.

    By static scales a row is rounded for each of its experts, so that there is one for each pair.
    Below 8.9 e4m3 comes as int16 of two codes.
    """
    every = weight.every
    if isinstance(every, Int8Weight):
        return quantize_rows(x, torch.int8)
    if not isinstance(every, Fp8Weight):
        return x, None
    if every.input_scale is not None and every.activations == "static":
        codes, scales = round_by_scale(x, every.input_scale, chosen), every.input_scale
    else:
        block = 0 if every.block_shape is None else every.block_shape[1]
        codes, scales = quantize_rows(x, torch.float8_e4m3fn, block)
    native = facts_of(x).capability >= HAS_E4M3
    return (codes if native else codes.view(torch.int16)), scales


def expert_linear(
    x: Tensor, weight: StackedWeight, chosen: Tensor, order: ExpertOrder, top_k: int
) -> Tensor:
    """Each row of x times the weights of its experts: x [T, K] -> [T * top_k, N] in x's dtype.

    `chosen` int64 [T, top_k], `order` its pairs by expert; with `top_k` 1 there is a row of x for
    each pair.
    """
    num_experts, n, k = weight.shape
    pairs = x.shape[0] * top_k
    out = torch.empty((pairs, n), dtype=x.dtype, device=x.device)
    if not pairs:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    facts = facts_of(x)
    sizes = (order.block_m, n, k, num_experts)
    rounded_pairs = tuning.round_rows(pairs)
    if weight_only.takes(weight.every):
        columns, lanes = expert_weight_only.unit_of(weight)
        problem = Problem(WEIGHT_ONLY, (*sizes, columns, rounded_pairs, lanes), (str(x.dtype),))
        tile = tuning.choice_for(problem, default_choice, facts).tiles
        expert_weight_only.multiply(x, weight, order, top_k, out, tile)
        return out
    rounded, scales = _rounded(x, weight, chosen.view(-1, top_k))
    kinds = {torch.int8: "int8", torch.float8_e4m3fn: "e4m3", torch.int16: "codes"}
    every = weight.every
    assert isinstance(every, (DenseWeight, Int8Weight, Fp8Weight))
    block = every.block_shape if isinstance(every, Fp8Weight) else None
    block_rows, columns = block or (1, 0)
    problem = Problem(
        KERNEL,
        (*sizes, columns, rounded_pairs),
        (str(x.dtype), kinds.get(rounded.dtype, str(x.dtype))),
    )
    tile = tuning.choice_for(problem, default_choice, facts).tiles
    static = isinstance(every, Fp8Weight) and every.activations == "static"
    lanes = 2 if rounded.dtype == torch.int16 else 1
    block_k = tile["block_k"] // lanes
    count = len(order.experts)
    expert_matmul_kernel[(count * triton.cdiv(n, tile["block_n"]),)](
        rounded,
        out if scales is None else scales,
        every.data.view(rounded.dtype),
        out if isinstance(every, DenseWeight) else every.scales,
        out,
        order.pairs,
        order.experts,
        order.rows,
        count,
        n,
        k // lanes,
        rounded.stride(0),
        0 if scales is None or static else scales.stride(0),
        0 if static else 1,
        1 if static else 0,
        SCALED=scales is not None,
        WIDEN=lanes > 1,
        TOP_K=1 if static else top_k,
        SWAP=bool(tile["swap"]),
        EVEN_K=(k // lanes) % block_k == 0,
        ROWS=block_rows,
        COLUMNS=columns // lanes,
        GROUP=8,
        BLOCK_M=order.block_m,
        BLOCK_N=tile["block_n"],
        BLOCK_K=block_k,
        STAGES=tile["num_stages"],
        INTERPRETED=x.device.type == "cpu",
        num_warps=tile["num_warps"],
    )
    return out


def weighted_sum(by_choice: Tensor, weights: Tensor) -> Tensor:
    """by_choice [T * top_k, N] times weights float32 [T, top_k], summed in order -> [T, N]."""
    tokens, top_k = weights.shape
    n = by_choice.shape[1]
    out = torch.empty((tokens, n), dtype=by_choice.dtype, device=by_choice.device)
    block = min(1024, triton.next_power_of_2(n))
    if tokens:
        _sum_kernel[(tokens, triton.cdiv(n, block))](
            by_choice,
            weights.contiguous(),
            out,
            n,
            TOP_K=top_k,
            BLOCK=block,
            num_warps=4,
            # A product fused with its addition would be rounded once, not twice.
            enable_fp_fusion=False,
        )
    return out


def run(
    x: Tensor,
    gate_up: StackedWeight,
    down: StackedWeight,
    weights: Tensor,
    chosen: Tensor,
    gated: Callable[[Tensor], Tensor],
) -> Tensor:
    """As ``kernels.experts.run_stacked``."""
    num_experts = gate_up.shape[0]
    chosen = chosen.contiguous()
    block_m = rows_of_tiles(chosen.numel(), num_experts)
    order = order_by_expert(chosen, num_experts, block_m)
    inner = gated(expert_linear(x, gate_up, chosen, order, chosen.shape[1]))
    return weighted_sum(expert_linear(inner, down, chosen, order, 1), weights)
