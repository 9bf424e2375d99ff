"""FP8 e4m3 weights with activations rounded to e4m3: by channel, and by blocks of both.

Below compute capability 8.9, which has no e4m3, codes are widened to fp16 in the kernel, exactly;
what is multiplied is the same.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import plain_linear
from kernels.rounding import FP8_MAX
from kernels.triton import rounding, scaled_tiles, tuning
from kernels.triton.quantize_rows import quantize_rows
from kernels.triton.runtime import FLOATS, DeviceFacts, facts_of
from kernels.triton.scaled_matmul import merge, product, scaled_matmul, tile_of
from kernels.triton.scaled_tiles import splits_for
from kernels.triton.tuning import Choice, Problem
from kernels.weights import Fp8Weight, LinearWeight

HAS_E4M3 = (8, 9)
_MOST = tl.constexpr(FP8_MAX)


@triton.jit
def _round_kernel(
    x,
    data,
    scales,
    experts,
    stride,
    width,
    TOP_K: tl.constexpr,
    CODE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    source = row
    which = 0
    if TOP_K > 0:
        source = row // TOP_K
        which = tl.load(experts + row)
    scale = tl.load(scales + which)
    values = tl.load(x + source * stride + column, mask=inside, other=0.0).to(tl.float32)
    values = tl.div_rn(values, tl.full(values.shape, 1.0, tl.float32) * scale)
    # Not a minimum, which would lose NaN.
    values = tl.where(values > _MOST, _MOST, tl.where(values < -_MOST, -_MOST, values))
    tl.store(data + row * width + column, rounding.rounded(values, CODE), mask=inside)


def round_by_scale(x: Tensor, scales: Tensor, chosen: Tensor | None = None) -> Tensor:
    """x [M, K] / scale -> e4m3 [M, K], saturating; `scales` float32 [1].

    With `chosen` (experts int64 [M, top_k]) each token is rounded once for each of its experts by
    that one's scale: -> [M * top_k, K].
    """
    (m, k), top_k = x.shape, 0 if chosen is None else chosen.shape[1]
    rows = m * max(1, top_k)
    data = torch.empty((rows, k), dtype=torch.float8_e4m3fn, device=x.device)
    block = min(2048, triton.next_power_of_2(k))
    if rows:
        _round_kernel[(rows, triton.cdiv(k, block))](
            x,
            data.view(torch.uint8),
            scales,
            scales if chosen is None else chosen,
            x.stride(0),
            k,
            TOP_K=top_k,
            CODE=rounding.code_of(torch.float8_e4m3fn, facts_of(x)),
            BLOCK=block,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return data


# Numbers that change from step to step must not make a new kernel of it.
@triton.jit(do_not_specialize=["m"])
def block_scaled_kernel(
    x,
    x_scales,
    w,
    w_scales,
    bias,
    out,
    m,
    n,
    k,
    x_scale_stride,
    x_block_stride,
    w_scale_stride,
    length,
    WIDEN: tl.constexpr,
    SWAP: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One tile of the output, or of one part of K's products when split.

    x [m, k] has a scale for each row and COLUMNS of its columns, w [n, k] one for each ROWS x
    COLUMNS; BLOCK_K divides COLUMNS. With WIDEN columns are counted in int16 of two codes. `out`
    [m, n], or the parts [SPLITS, m, n] in float32.
    """
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP)
    split = tl.program_id(1)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets = tl.arange(0, BLOCK_K)
    row_ids = tl.minimum(rows, m - 1).to(tl.int64)
    column_ids = tl.minimum(columns, n - 1).to(tl.int64)
    read_rows = row_ids[:, None] * k + offsets[None, :]
    read_columns = column_ids[:, None] * k + offsets[None, :]
    ONE: tl.constexpr = ROWS % BLOCK_N == 0
    if ONE:
        of_columns = (tile_n * BLOCK_N // ROWS) * w_scale_stride
    else:
        of_columns = (column_ids // ROWS) * w_scale_stride
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    begin = split * length
    end = tl.minimum(begin + length, k)
    # With its own number of stages a loop loads ahead what no matrix instruction takes, too.
    for at in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        if EVEN_K:
            a = tl.load(x + read_rows + at)
            b = tl.load(w + read_columns + at)
        else:
            inside = (at + offsets < k)[None, :]
            a = tl.load(x + read_rows + at, mask=inside, other=0.0)
            b = tl.load(w + read_columns + at, mask=inside, other=0.0)
        block = at // COLUMNS
        by_row = tl.load(x_scales + row_ids * x_scale_stride + block * x_block_stride)
        by_column = tl.load(w_scales + of_columns + block)
        sums = product(a, b, None, SWAP, WIDEN, INTERPRETED)
        if ONE:
            by_row = by_row * by_column
            acc += sums * (by_row[None, :] if SWAP else by_row[:, None])
        elif SWAP:
            acc += sums * by_row[None, :] * by_column[:, None]
        else:
            acc += sums * by_row[:, None] * by_column[None, :]
    if SWAP:
        place = rows.to(tl.int64)[None, :] * n + columns[:, None]
        stored = (rows < m)[None, :] & (columns < n)[:, None]
    else:
        place = rows.to(tl.int64)[:, None] * n + columns[None, :]
        stored = (rows < m)[:, None] & (columns < n)[None, :]
    if SPLITS > 1:
        place += split.to(tl.int64) * m * n
    elif BIAS:
        added = tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)
        acc += added[:, None] if SWAP else added[None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=stored)


def block_scaled_matmul(
    x: Tensor,
    x_scales: Tensor,
    weight: Fp8Weight,
    dtype: torch.dtype,
    tile: Mapping[str, int],
) -> Tensor:
    """x [M, K] with scales [M, K / columns], or one for all, times a weight in blocks -> [M, N]."""
    assert weight.block_shape is not None
    (m, k), n = x.shape, weight.shape[0]
    out = torch.empty((m, n), dtype=dtype, device=x.device)
    if m == 0:
        return out
    block_m, block_n = tile["block_m"], tile["block_n"]
    widen = x.dtype == torch.int16
    columns = weight.block_shape[1] // 2 if widen else weight.block_shape[1]
    block_k = min(tile["block_k"] // 2 if widen else tile["block_k"], columns)
    splits = splits_for(m, n, k, {**tile, "block_k": block_k}, facts_of(x))
    length = triton.cdiv(triton.cdiv(k, splits), block_k) * block_k
    splits = triton.cdiv(k, length)
    single = x_scales.numel() == 1
    parts = out
    if splits > 1:
        parts = torch.empty((splits, m, n), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(m, block_m) * triton.cdiv(n, block_n), splits)
    block_scaled_kernel[grid](
        x,
        x_scales,
        weight.data.view(x.dtype),
        weight.scales,
        out if weight.bias is None else weight.bias,
        parts,
        m,
        n,
        k,
        0 if single else x_scales.stride(0),
        0 if single else 1,
        weight.scales.stride(0),
        length,
        WIDEN=widen,
        SWAP=bool(tile["swap"]),
        SPLITS=splits,
        EVEN_K=k % block_k == 0,
        BIAS=weight.bias is not None,
        ROWS=weight.block_shape[0],
        COLUMNS=columns,
        GROUP=8,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        STAGES=tile["num_stages"],
        INTERPRETED=x.device.type == "cpu",
        num_warps=tile["num_warps"],
    )
    if splits > 1:
        merge(parts, None, None, weight.bias, out)
    return out


def default_choice(problem: Problem, facts: DeviceFacts) -> Choice:
    """By channel and for many rows PyTorch's product where it is offered, else Triton's kernel."""
    if problem.sizes[0] > 64 and _scaled_mm_takes(problem, facts):
        return Choice("scaled_mm")
    if "blocks" in problem.dtypes:
        return Choice("triton", _block_tiles(scaled_tiles.tiles(problem.sizes[0], facts), problem))
    return scaled_tiles.default_choice(problem, facts)


def choices(problem: Problem, facts: DeviceFacts) -> list[Choice]:
    """Triton's tiles, and PyTorch's product by rows and channels."""
    found = scaled_tiles.triton_choices(problem, facts)
    if "blocks" in problem.dtypes:
        narrowed = [Choice("triton", _block_tiles(choice.tiles, problem)) for choice in found]
        found = [c for i, c in enumerate(narrowed) if c not in narrowed[:i]]
    if _scaled_mm_takes(problem, facts):
        found.append(Choice("scaled_mm"))
    return found


def _block_tiles(tile: Mapping[str, int], problem: Problem) -> dict[str, int]:
    return {**tile, "block_k": min(tile["block_k"], problem.sizes[3])}


def _scaled_mm_takes(problem: Problem, facts: DeviceFacts) -> bool:
    """Whether PyTorch's product by rows and channels may be used.

    Its operands are multiples of 16 wide and its output is bfloat16: that is what every version
    from CUDA 12.0 on takes on 8.9 and 9.0. Interpreted kernels have no such product beside them.
    """
    _, n, k = problem.sizes[:3]
    return (
        "torch.bfloat16" in problem.dtypes
        and "blocks" not in problem.dtypes
        and n % 16 == 0
        and k % 16 == 0
        and facts.capability >= HAS_E4M3
        and facts.name != "interpreter"
    )


tuning.announce("fp8_linear", choices)


def pack(weight: LinearWeight) -> Fp8Weight | None:
    """The same tensors; blocks must be of 32 columns or a greater power of two."""
    if not isinstance(weight, Fp8Weight) or weight.activations == "none" or weight.shape[1] % 16:
        return None
    if weight.block_shape is not None:
        columns = weight.block_shape[1]
        if columns < 32 or columns & (columns - 1):
            return None
    return replace(weight, layout="triton")


def takes(weight: LinearWeight) -> bool:
    """Whether this module packed the weight."""
    return isinstance(weight, Fp8Weight) and weight.activations != "none"


def dequantize(weight: LinearWeight) -> Tensor:
    """[N, K] in float32."""
    return plain_linear.dequantize(weight)


def rounded_rows(rows: Tensor, weight: Fp8Weight) -> tuple[Tensor, Tensor]:
    """rows [M, K] as e4m3, or below 8.9 as int16 of two codes [M, K / 2], and their scales.

    Scales are [1] where activations are static, else [M, 1] or [M, K / columns of a block].
    """
    if weight.activations == "static":
        assert weight.input_scale is not None
        x, scales = round_by_scale(rows, weight.input_scale), weight.input_scale
    else:
        block = 0 if weight.block_shape is None else weight.block_shape[1]
        x, scales = quantize_rows(rows, torch.float8_e4m3fn, block)
    if facts_of(rows).capability < HAS_E4M3:
        x = x.view(torch.int16)
    return x, scales


def linear(rows: Tensor, weight: LinearWeight) -> Tensor:
    """rows [M, K] -> [M, N] in their dtype."""
    assert isinstance(weight, Fp8Weight)
    if rows.dtype not in FLOATS:
        return plain_linear.linear(rows, weight)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    sizes: tuple[int, ...] = (tuning.round_rows(rows.shape[0]), *weight.shape)
    kinds: tuple[str, ...] = (str(rows.dtype),)
    if weight.block_shape is not None:
        sizes, kinds = (*sizes, weight.block_shape[1], weight.block_shape[0]), (*kinds, "blocks")
    problem = Problem("fp8_linear", sizes, kinds)
    choice = tuning.choice_for(problem, default_choice, facts_of(rows))
    x, scales = rounded_rows(rows, weight)
    if weight.block_shape is not None:
        return block_scaled_matmul(x, scales, weight, rows.dtype, choice.tiles)
    if choice.path == "scaled_mm" and len(x):
        return torch._scaled_mm(
            x,
            weight.data.t(),
            scale_a=scales.expand(len(x), 1).contiguous(),
            scale_b=weight.scales[None],
            bias=None if weight.bias is None else weight.bias.to(rows.dtype),
            out_dtype=rows.dtype,
        )
    return scaled_matmul(
        x,
        scales,
        weight.data.view(x.dtype),
        weight.scales,
        weight.bias,
        rows.dtype,
        choice.tiles or scaled_tiles.tiles(len(x), facts_of(rows)),
    )
