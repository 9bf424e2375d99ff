"""RMS norms: of rows, of rows added to a residual, of heads in place."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.runtime import FLOATS, facts_of

WIDEST_ROW = 16_384  # elements that one program holds in registers
ELEMENTS_PER_THREAD = 16  # two 16-byte loads of 16-bit values under way at once


def row_warps(block: int) -> int:
    """Warps for a row of `block` elements, whatever the number of rows.

    The order of a row's sum follows from it, and no row may depend on the rows beside it.
    """
    return max(1, min(32, block // (32 * ELEMENTS_PER_THREAD)))


@triton.jit
def weighted(normed, weight, dtype: tl.constexpr, ROUND_FIRST: tl.constexpr):
    """`normed * weight`, in float32, rounded to `dtype` once or before the product too."""
    if ROUND_FIRST:
        normed = normed.to(dtype).to(tl.float32)
    return (normed * weight.to(tl.float32)).to(dtype)


@triton.jit
def _rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    x_stride,
    residual_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    values = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    weights = tl.load(weight + column, mask=inside, other=0.0)
    if residual is not None:
        places = residual + row * residual_stride + column
        values += tl.load(places, mask=inside, other=0.0).to(tl.float32)
        total = values.to(out.dtype.element_ty)
        tl.store(places, total, mask=inside)
        values = total.to(tl.float32)
    mean = tl.sum(values * values, 0) / WIDTH
    normed = values * tl.rsqrt(mean + eps)
    normed = weighted(normed, weights, out.dtype.element_ty, ROUND_FIRST)
    tl.store(out + row * WIDTH + column, normed, mask=inside)


def fits_weight(weight: Tensor, x: Tensor, width: int) -> bool:
    """Whether a norm's kernels take this weight."""
    return (
        weight.dtype in (x.dtype, torch.float32)
        and weight.shape == (width,)
        and weight.is_contiguous()
        and weight.device == x.device
    )


def rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor | None:
    """The norm of x, or of ``residual += x`` when a residual is given, in one kernel."""
    if x.dim() != 2 or x.dtype not in FLOATS or x.stride(1) != 1:
        return None
    rows, width = x.shape
    if not 0 < width <= WIDEST_ROW or not fits_weight(weight, x, width):
        return None
    if residual is not None and (
        residual.dtype != x.dtype or residual.shape != x.shape or residual.stride(1) != 1
    ):
        return None
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if not rows:
        return out
    block = triton.next_power_of_2(width)
    _rms_norm_kernel[(rows,)](
        x,
        residual,
        weight,
        out,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        WIDTH=width,
        BLOCK=block,
        ROUND_FIRST=weight.dtype == x.dtype,
        num_warps=row_warps(block),
    )
    return out


# Numbers that change from step to step must not make a new kernel of it.
@triton.jit(do_not_specialize=["num_rows"])
def _head_rms_norm_kernel(
    x,
    weight,
    x_stride,
    eps,
    num_rows,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token, head = row // HEADS, row % HEADS
    column = tl.arange(0, BLOCK_D)
    inside = (row < num_rows)[:, None] & (column < HEAD_DIM)[None, :]
    places = x + (token.to(tl.int64) * x_stride + head * HEAD_DIM)[:, None] + column[None, :]
    values = tl.load(places, mask=inside, other=0.0).to(tl.float32)
    weights = tl.load(weight + column, mask=column < HEAD_DIM, other=0.0)
    mean = tl.sum(values * values, 1) / HEAD_DIM
    normed = values * tl.rsqrt(mean + eps)[:, None]
    normed = weighted(normed, weights[None, :], x.dtype.element_ty, ROUND_FIRST)
    tl.store(places, normed, mask=inside)


def heads_are_packed(x: Tensor) -> bool:
    """Whether x [T, H, Dh] has each token's heads side by side."""
    return x.dim() == 3 and x.stride(2) == 1 and x.stride(1) == x.shape[2]


def head_rms_norm(x: Tensor, weight: Tensor, eps: float) -> bool:
    """Norm each head in place; False if the operands are not of the expected kind."""
    if x.dtype not in FLOATS or not heads_are_packed(x):
        return False
    tokens, heads, head_dim = x.shape
    if not 0 < head_dim <= 512 or not fits_weight(weight, x, head_dim):
        return False
    rows = tokens * heads
    if not rows:
        return True
    block_d = triton.next_power_of_2(head_dim)
    # Four warps hold a row in one register of 16 bytes a thread; more rows where there are many.
    block_rows = max(1, 1024 // block_d)
    if rows >= 64 * block_rows * facts_of(x).multiprocessors:
        block_rows *= 4
    _head_rms_norm_kernel[(triton.cdiv(rows, block_rows),)](
        x,
        weight,
        x.stride(0),
        eps,
        rows,
        HEADS=heads,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_ROWS=block_rows,
        ROUND_FIRST=weight.dtype == x.dtype,
        num_warps=4,
    )
    return True
