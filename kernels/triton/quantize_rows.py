"""Rows rounded to int8 or e4m3 by their own maxima, whole or by blocks of columns."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.plain_linear import SMALLEST_MAXIMUM
from kernels.triton.norm import row_warps
from kernels.triton.rounding import code_of, magnitude, rounded, scales
from kernels.triton.runtime import FLOATS, facts_of

WIDEST_BLOCK = 16_384  # columns that one program holds in registers; more are read twice
CHUNK = 8192


# Numbers that change from step to step must not make a new kernel of it.
@triton.jit(do_not_specialize=["num_blocks"])
def _block_kernel(
    x,
    data,
    row_scales,
    x_stride,
    width,
    num_blocks,
    BLOCKS_PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
    COUNT: tl.constexpr,
    LEAST: tl.constexpr,
    CODE: tl.constexpr,
):
    """COUNT blocks a program, numbered along rows."""
    block = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    row = block // BLOCKS_PER_ROW
    begin = block % BLOCKS_PER_ROW * BLOCK
    offset = tl.arange(0, PADDED)[None, :]
    column = begin[:, None] + offset
    inside = (block < num_blocks)[:, None] & (offset < BLOCK) & (column < width)
    values = tl.load(x + row[:, None] * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    scale, inverse = scales(tl.max(magnitude(values), 1), LEAST, CODE)
    tl.store(row_scales + block, scale, mask=block < num_blocks)
    codes = rounded(values * inverse[:, None], CODE)
    tl.store(data + row[:, None] * width + column, codes, mask=inside)


@triton.jit
def _wide_row_kernel(
    x,
    data,
    row_scales,
    x_stride,
    width,
    SIZE: tl.constexpr,
    LEAST: tl.constexpr,
    CODE: tl.constexpr,
):
    """A row a program, too long for registers: once for its maximum, again for its codes."""
    row = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, SIZE)
    largest = tl.zeros((SIZE,), tl.int32)
    for begin in range(0, width, SIZE):
        inside = begin + offset < width
        values = tl.load(x + row * x_stride + begin + offset, mask=inside, other=0.0)
        largest = tl.maximum(largest, magnitude(values.to(tl.float32)))
    scale, inverse = scales(tl.max(largest, 0), LEAST, CODE)
    tl.store(row_scales + row, scale)
    for begin in range(0, width, SIZE):
        inside = begin + offset < width
        values = tl.load(x + row * x_stride + begin + offset, mask=inside, other=0.0)
        codes = rounded(values.to(tl.float32) * inverse, CODE)
        tl.store(data + row * width + begin + offset, codes, mask=inside)


def quantize_rows(x: Tensor, dtype: torch.dtype, block: int = 0) -> tuple[Tensor, Tensor]:
    """Round x [M, K] symmetrically, each row by its maximum, or each `block` columns of it.

    dtype: int8, with the bits of ``plain_linear.quantize_rows`` (`scale = max / 127`, 0 for a row
    of zeros), or float8_e4m3fn, with those of ``plain_linear.round_fp8`` (`max / 448`, a maximum
    counting as at least 1e-30). Rows may be strided, elements of a row may not. Returns
    (data [M, K], float32 scales [M, ceil(K / block)], one column without a block), contiguous.
    A NaN makes its scale NaN. Raises ValueError for other operands.
    """
    if x.dim() != 2 or x.stride(1) != 1 or x.dtype not in FLOATS:
        raise ValueError(f"rows of {x.dtype} with strides {x.stride()} cannot be quantized")
    rows, width = x.shape
    size = min(block, width) if block else width
    per_row = triton.cdiv(width, size) if size else 1
    data = torch.empty((rows, width), dtype=dtype, device=x.device)
    row_scales = torch.empty((rows, per_row), dtype=torch.float32, device=x.device)
    if not data.numel():
        return data, row_scales.zero_()
    facts = facts_of(x)
    least = 0.0 if dtype == torch.int8 else SMALLEST_MAXIMUM
    code = code_of(dtype, facts)
    codes = data.view(torch.uint8)
    if size > WIDEST_BLOCK and per_row == 1:
        _wide_row_kernel[(rows,)](
            x,
            codes,
            row_scales,
            x.stride(0),
            width,
            SIZE=CHUNK,
            LEAST=least,
            CODE=code,
            num_warps=16,
            enable_fp_fusion=False,
        )
        return data, row_scales
    padded = triton.next_power_of_2(size)
    blocks = rows * per_row
    # Short blocks share a program: four warps with 8 elements a thread, 32 where there are many.
    count = max(1, 1024 // padded)
    if blocks >= 64 * count * facts.multiprocessors:
        count *= min(4, max(1, 4096 // (count * padded)))
    _block_kernel[(triton.cdiv(blocks, count),)](
        x,
        codes,
        row_scales,
        x.stride(0),
        width,
        blocks,
        BLOCKS_PER_ROW=per_row,
        BLOCK=size,
        PADDED=padded,
        COUNT=count,
        LEAST=least,
        CODE=code,
        num_warps=4 if padded <= 1024 else row_warps(padded),
        enable_fp_fusion=False,
    )
    return data, row_scales
