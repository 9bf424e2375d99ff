"""Gated activations: ``silu(gate) * up`` and ``gelu(gate) * up``."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.runtime import FLOATS, facts_of

SILU = tl.constexpr(0)
GELU_ERF = tl.constexpr(1)
GELU_TANH = tl.constexpr(2)


@triton.jit
def activated(gate, KIND: tl.constexpr):
    """The activation of float32 values."""
    if KIND == SILU:
        result = gate / (1 + tl.exp(-gate))
    elif KIND == GELU_ERF:
        result = gate * 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
    else:
        # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), here with 2 sqrt(2 / pi).
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        result = gate / (1 + tl.exp(-inner))
    return result


@triton.jit
def _gated_kernel(x, out, x_stride, width, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gates = x + row * x_stride + column
    gate = tl.load(gates, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gates + width, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = out.dtype.element_ty
    # Rounded before the product, as two operations of PyTorch's are.
    gated = activated(gate, KIND).to(dtype).to(tl.float32) * up
    tl.store(out + row * width + column, gated.to(dtype), mask=inside)


def _gated(x: Tensor, kind: int) -> Tensor | None:
    if x.dim() != 2 or x.dtype not in FLOATS or x.stride(1) != 1 or x.shape[1] % 2:
        return None
    rows, width = x.shape[0], x.shape[1] // 2
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    # Two 16-byte loads of each operand a thread, one where that would leave multiprocessors idle.
    block, least = 2048, 4 * facts_of(x).multiprocessors
    while block > 512 and rows * triton.cdiv(width, block) < least:
        block //= 2
    _gated_kernel[(rows, triton.cdiv(width, block))](
        x, out, x.stride(0), width, KIND=kind, BLOCK=block, num_warps=max(2, block // 512)
    )
    return out


def silu_and_mul(x: Tensor) -> Tensor | None:
    """``silu(gate) * up``."""
    return _gated(x, int(SILU.value))


def gelu_and_mul(x: Tensor, approximate: str) -> Tensor | None:
    """``gelu(gate) * up``."""
    return _gated(x, int((GELU_TANH if approximate == "tanh" else GELU_ERF).value))
