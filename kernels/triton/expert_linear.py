"""Matmuls of a mixture of experts: tiles of rows sorted by expert, each with its expert's weight.

Rows are gathered by the loads and scattered by the stores, so that nothing is copied in between.
"""

from collections.abc import Callable, Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.experts import StackedWeight
from kernels.triton import tuning
from kernels.triton.expert_order import ExpertOrder, order_by_expert
from kernels.triton.fp8_linear import HAS_E4M3, round_by_scale
from kernels.triton.quantize_rows import quantize_rows
from kernels.triton.runtime import DeviceFacts, facts_of
from kernels.triton.scaled_matmul import E4M3_CODES, product, tile_of, widen_e4m3
from kernels.triton.tuning import Choice, Problem
from kernels.weights import DenseWeight, Fp8Weight, Int4Weight, Int8GroupWeight, Int8Weight

CODES = 256.0  # by so much ``widen_e4m3`` makes its values too small


@triton.jit
def _float_product(x, w, acc, SWAP: tl.constexpr):
    """acc plus x [M, K] times w [N, K], both in x's dtype."""
    w = w.to(x.dtype)
    if SWAP:
        return tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    else:  # noqa: RET505 - only one of two types may be returned, and a branch not taken is not
        return tl.dot(x, tl.trans(w), acc, input_precision="ieee")


@triton.jit
def expert_matmul_kernel(
    x,
    x_scales,
    w,
    w_scales,
    w_zeros,
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
    FORMAT: tl.constexpr,
    SCALED_ROWS: tl.constexpr,
    TOP_K: tl.constexpr,
    SWAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    FACTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile: rows of one expert, BLOCK_N of its outputs.

    Row ``pair // TOP_K`` of x goes to row `pair` of `out` [pairs, n]. FORMAT tells what w [E, n, k]
    holds: "dense", "int8", "e4m3" (as x does), "codes" (e4m3 widened here, x in floats or codes
    too), "int4" (two to a byte) or "int8_groups". Scales of w are by channel [E, n] (COLUMNS 0), by
    blocks of ROWS x COLUMNS [E, n / ROWS, k / COLUMNS], or for the last two formats by groups
    [E, k / COLUMNS, n]. x has scales where SCALED_ROWS.
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
    column_ids = tl.minimum(columns, n - 1).to(tl.int64)
    offsets = tl.arange(0, BLOCK_K)
    read_rows = x + source[:, None] * x_stride + offsets[None, :]
    PACK: tl.constexpr = 2 if FORMAT == "int4" else 1
    packed = tl.arange(0, BLOCK_K // PACK)
    read_columns = w + (expert * n + column_ids)[:, None] * (k // PACK) + packed[None, :]
    row_scales = x_scales + source * x_scale_stride + expert * x_expert_stride
    IN_GROUPS: tl.constexpr = FORMAT == "int4" or FORMAT == "int8_groups"
    INTEGERS: tl.constexpr = FORMAT == "int8"
    CODED: tl.constexpr = FORMAT == "codes" and SCALED_ROWS
    blocks = tl.cdiv(k, COLUMNS) if COLUMNS > 0 else 1
    if IN_GROUPS:
        column_scales = expert * blocks * n + column_ids
    elif COLUMNS > 0 and ROWS % BLOCK_N == 0:
        column_scales = (expert * tl.cdiv(n, ROWS) + tile_n * BLOCK_N // ROWS) * blocks
    elif COLUMNS > 0:
        column_scales = (expert * tl.cdiv(n, ROWS) + column_ids // ROWS) * blocks
    acc = tl.zeros(
        (BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.int32 if INTEGERS else tl.float32
    )
    for at in range(0, k, BLOCK_K):
        if EVEN_K:
            a = tl.load(read_rows + at)
            b = tl.load(read_columns + at // PACK)
        else:
            a = tl.load(read_rows + at, mask=(at + offsets < k)[None, :], other=0.0)
            inside = (at + packed * PACK < k)[None, :]
            b = tl.load(read_columns + at // PACK, mask=inside, other=0.0)
        if IN_GROUPS:
            group = column_scales + (at // COLUMNS) * n
            scale = tl.load(w_scales + group)[:, None]
            zero = tl.load(w_zeros + group)[:, None]
            if FORMAT == "int4":
                even, odd = tl.split(tl.reshape(a, (BLOCK_M, BLOCK_K // 2, 2)))
                low = ((b & 15).to(tl.float32) - zero) * scale
                acc = _float_product(even, low, acc, SWAP)
                high = ((b >> 4).to(tl.float32) - zero) * scale
                acc = _float_product(odd, high, acc, SWAP)
            else:
                acc = _float_product(a, (b.to(tl.float32) - zero) * scale, acc, SWAP)
        elif COLUMNS > 0:
            by_column = tl.load(w_scales + column_scales + at // COLUMNS)
            if FORMAT == "codes" and not SCALED_ROWS:
                zeros = tl.zeros_like(acc)
                sums = _float_product(a, widen_e4m3(b).to(tl.float32), zeros, SWAP)
            else:
                sums = product(a, b, None, SWAP, CODED)
            if SCALED_ROWS:
                by_row = tl.load(row_scales + (at // COLUMNS) * x_block_stride)
                if ROWS % BLOCK_N == 0:
                    by_row *= by_column
                sums *= by_row[None, :] if SWAP else by_row[:, None]
            if ROWS % BLOCK_N > 0:
                sums *= by_column[:, None] if SWAP else by_column[None, :]
            elif not SCALED_ROWS:
                sums *= by_column
            acc += sums
        elif FORMAT == "dense":
            acc = _float_product(a, b, acc, SWAP)
        elif FORMAT == "codes" and not SCALED_ROWS:
            acc = _float_product(a, widen_e4m3(b).to(tl.float32), acc, SWAP)
        elif INTEGERS or CODED:
            acc = product(a, b, acc, SWAP, CODED)
        else:
            acc += product(a, b, None, SWAP, False)
    sums = acc.to(tl.float32)
    if FACTOR != 1.0:
        sums *= FACTOR
    if COLUMNS == 0 and FORMAT != "dense":
        by_column = tl.load(w_scales + expert * n + columns, mask=columns < n, other=0.0)
        if SCALED_ROWS:
            by_row = tl.load(row_scales)
            sums *= by_row[None, :] if SWAP else by_row[:, None]
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
    bytes_of_k = 128 if problem.dtypes[1] in ("int8", "e4m3", "codes") else 64
    if problem.dtypes[0] == "torch.float32":
        bytes_of_k = 32
    return {
        "swap": int(swap),
        "block_n": 64 if swap else 128,
        "block_k": _least(2 * bytes_of_k if swap and block_m <= 32 else bytes_of_k, columns),
        "num_warps": 4 if swap else 8,
        "num_stages": 4 if facts.shared_memory >= 160_000 else 3,
    }


def _least(block_k: int, columns: int) -> int:
    return min(block_k, columns) if columns else block_k


def default_choice(problem: Problem, facts: DeviceFacts) -> Choice:
    """Tiles as for an ordinary product: the weight is the tall operand where rows are few."""
    return Choice("triton", _tiles(problem, facts))


def choices(problem: Problem, facts: DeviceFacts) -> list[Choice]:
    """Tiles worth measuring that fit the device's shared memory."""
    block_m, columns = problem.sizes[0], problem.sizes[4]
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
            {"block_n": 256, "num_stages": 3},
            {"block_n": 64, "num_warps": 4},
            {"block_k": start["block_k"] // 2, "num_stages": 5},
        ]
    wide = {"torch.float32": 4}.get(problem.dtypes[0], 2)
    x_bytes = 1 if problem.dtypes[1] in ("int8", "e4m3") else wide
    w_bytes = wide if problem.dtypes[1] == "dense" else 1
    found: list[Choice] = []
    for change in changes:
        tile = {**start, **change}
        tile["block_k"] = _least(tile["block_k"], columns)
        stage = (block_m * x_bytes + tile["block_n"] * w_bytes) * tile["block_k"]
        choice = Choice("triton", tile)
        fits = stage * tile["num_stages"] <= facts.shared_memory - 16_384
        if fits and tile["block_k"] >= 32 and choice not in found:
            found.append(choice)
    return found


tuning.announce("expert_linear", choices)


def _format(weight: StackedWeight, facts: DeviceFacts) -> str:
    first = weight.first
    if isinstance(first, DenseWeight):
        return "dense"
    if isinstance(first, Int8Weight):
        return "int8"
    if isinstance(first, Int4Weight):
        return "int4"
    if isinstance(first, Int8GroupWeight):
        return "int8_groups"
    native = first.activations != "none" and facts.capability >= HAS_E4M3
    return "e4m3" if native else "codes"


def _columns(weight: StackedWeight) -> tuple[int, int]:
    """Rows and columns of a block of one scale; (1, 0) where scales are by channel."""
    first = weight.first
    if isinstance(first, Fp8Weight) and first.block_shape is not None:
        return first.block_shape
    if isinstance(first, (Int4Weight, Int8GroupWeight)):
        return 1, first.group_size
    return 1, 0


def _rounded(x: Tensor, weight: StackedWeight, chosen: Tensor) -> tuple[Tensor, Tensor | None]:
    """Activations as the weight's format wants them, and their scales.

    By static scales a row is rounded for each of its experts, so that there is one for each pair.
    """
    first = weight.first
    if isinstance(first, Int8Weight):
        return quantize_rows(x, torch.int8)
    if not isinstance(first, Fp8Weight) or first.activations == "none":
        return x, None
    if weight.input_scales is not None:
        return round_by_scale(x, weight.input_scales, chosen), weight.input_scales
    block = 0 if first.block_shape is None else first.block_shape[1]
    return quantize_rows(x, torch.float8_e4m3fn, block)


def expert_linear(
    x: Tensor, weight: StackedWeight, chosen: Tensor, order: ExpertOrder, top_k: int
) -> Tensor:
    """Each row of x times the weights of its experts: x [T, K] -> [T * top_k, N] in x's dtype.

    `chosen` int64 [T, top_k], `order` its pairs by expert; with `top_k` 1 there is a row of x for
    each pair.
    """
    facts = facts_of(x)
    kind = _format(weight, facts)
    block_rows, columns = _columns(weight)
    num_experts, n, k = weight.shape
    pairs = x.shape[0] * top_k
    out = torch.empty((pairs, n), dtype=x.dtype, device=x.device)
    problem = Problem(
        "expert_linear",
        (order.block_m, n, k, num_experts, columns, tuning.round_rows(pairs)),
        (str(x.dtype), kind),
    )
    tile: Mapping[str, int] = tuning.choice_for(problem, default_choice, facts).tiles
    x = x if x.stride(1) == 1 else x.contiguous()
    rounded, scales = _rounded(x, weight, chosen.view(-1, top_k))
    static = weight.input_scales is not None
    data, factor = weight.data, 1.0
    if kind == "codes":
        data = data.view(torch.uint8)
        factor = CODES if scales is None else E4M3_CODES
        rounded = rounded if scales is None else rounded.view(torch.uint8)
    tiles = len(order.experts)
    if not pairs:
        return out
    expert_matmul_kernel[(tiles * triton.cdiv(n, tile["block_n"]),)](
        rounded,
        out if scales is None else scales,
        data,
        out if weight.scales is None else weight.scales,
        out if weight.zeros is None else weight.zeros,
        out,
        order.pairs,
        order.experts,
        order.rows,
        tiles,
        n,
        k,
        rounded.stride(0),
        0 if scales is None or static else scales.stride(0),
        0 if static else 1,
        1 if static else 0,
        FORMAT=kind,
        SCALED_ROWS=scales is not None,
        TOP_K=1 if static else top_k,
        SWAP=bool(tile["swap"]),
        EVEN_K=k % tile["block_k"] == 0,
        FACTOR=factor,
        ROWS=block_rows,
        COLUMNS=columns,
        GROUP=8,
        BLOCK_M=order.block_m,
        BLOCK_N=tile["block_n"],
        BLOCK_K=tile["block_k"],
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
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
