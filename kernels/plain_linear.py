"""Linear layers in plain PyTorch: every weight format on any device, in layout "plain"."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.rounding import FP8_MAX, quantize_last, spread_blocks
from kernels.slow_dtypes import multiplies_slowly
from kernels.weights import (
    DenseWeight,
    Fp8Weight,
    Int4Weight,
    Int8GroupWeight,
    Int8Weight,
    LinearWeight,
    Table4Weight,
    unpack_nibbles,
)

FEW_ROWS = 4  # so many rows are multiplied in a slow dtype before the weight is widened for them
EXACT_SUMS = 2**24 // 128**2  # products of int8 that float32 adds exactly
SMALLEST_MAXIMUM = 1e-30  # a row's maximum counts as at least this, so that no scale is 0


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per row: x [M, K] -> (int8 [M, K], float32 scales [M, 1])."""
    return quantize_last(x, torch.int8)


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """int8 [M, K] x int8 [N, K] -> int32 [M, N].

    CUDA's kernel wants more than 16 rows and multiples of 8, so the operands are padded there.
    """
    if multiplies_slowly(a):
        return _int8_as_floats(a, b)
    if a.device.type != "cuda":
        return torch._int_mm(a, b.t())
    m, k = a.shape
    n = b.shape[0]
    a = F.pad(a, (0, -k % 8, 0, max(32 - m, 0)))
    b = F.pad(b, (0, -k % 8, 0, -n % 8))
    return torch._int_mm(a, b.t())[:m, :n]


def _int8_as_floats(a: Tensor, b: Tensor) -> Tensor:
    """``int8_matmul`` in float32, in stretches of K whose sums are exact in its 24 bits."""
    out = torch.zeros((a.shape[0], b.shape[0]), dtype=torch.int32)
    for begin in range(0, a.shape[1], EXACT_SUMS):
        stretch = slice(begin, begin + EXACT_SUMS)
        out += (a[:, stretch].float() @ b[:, stretch].float().t()).to(torch.int32)
    return out


def split_outliers(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """What LLM.int8() multiplies in floating point (Dettmers et al. 2022, section 3.2).

    x [M, K] -> (x without its outliers [M, K], the columns that hold any [C], the outliers in
    those columns [M, C], 0 elsewhere); None if no element reaches the threshold. An outlier is an
    element, not a column as in the paper, so that no row depends on the rows beside it.
    """
    if not threshold:
        return None
    outlying = x.abs() >= threshold
    columns = outlying.any(0).nonzero().flatten()
    if not len(columns):
        return None
    return x.masked_fill(outlying, 0), columns, (x * outlying)[:, columns]


def round_fp8(x: Tensor, weight: Fp8Weight) -> Tensor:
    """x [M, K] as ``weight.activations`` rounds it to e4m3, back in float32."""
    wide = x.float()
    if weight.activations == "none":
        return wide
    if weight.activations == "static":
        assert weight.input_scale is not None
        return _round_e4m3(wide / weight.input_scale) * weight.input_scale
    k = x.shape[1]
    block = k if weight.block_shape is None else weight.block_shape[1]
    blocks = F.pad(wide, (0, -k % block)).reshape(x.shape[0], -(-k // block), block)
    largest = blocks.abs().amax(-1, keepdim=True).clamp_(min=SMALLEST_MAXIMUM)
    # A number divided by a tensor would be the product with its reciprocal, which rounds twice.
    inverse = torch.full_like(largest, FP8_MAX) / largest
    rounded = _round_e4m3(blocks * inverse) * (largest / FP8_MAX)
    return rounded.flatten(1)[:, :k]


def _round_e4m3(x: Tensor) -> Tensor:
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()


def fp8_scales(weight: Fp8Weight) -> Tensor:
    """Scales that broadcast against [N, K]."""
    if weight.block_shape is None:
        return weight.scales[:, None]
    return spread_blocks(weight.scales, weight.block_shape, weight.shape)


def dequantize(weight: LinearWeight) -> Tensor:
    """[N, K], columns as stored; float32, or a dense weight's own dtype."""
    if isinstance(weight, DenseWeight):
        return weight.data
    if isinstance(weight, Int8Weight):
        return weight.data.float() * weight.scales[:, None]
    if isinstance(weight, Fp8Weight):
        return weight.data.float() * fp8_scales(weight)
    assert isinstance(weight, (Int4Weight, Int8GroupWeight, Table4Weight))
    n, k = weight.shape
    q = weight.data if isinstance(weight, Int8GroupWeight) else unpack_nibbles(weight.data)
    groups = q.view(n, -1, weight.group_size)
    if isinstance(weight, Table4Weight):
        values = weight.table[groups.long()]
    else:
        values = groups.float() - weight.zeros[..., None]
    return (values * weight.scales[..., None]).view(n, k)


def linear(x: Tensor, weight: LinearWeight) -> Tensor:
    """x [M, K], columns as the weight stores them -> [M, N] in x's dtype."""
    if isinstance(weight, Int8Weight):
        return _int8_linear(x, weight)
    rows = round_fp8(x, weight).to(x.dtype) if isinstance(weight, Fp8Weight) else x
    return float_linear(rows, dequantize(weight), weight.bias)


def float_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` in x's dtype, computed in float32 where that is faster.

    The weight may be of another dtype. Few rows of a slow dtype are multiplied as they are: the
    weight would take longer to widen.
    """
    few = x.shape[:-1].numel() <= FEW_ROWS and weight.dtype == x.dtype
    if few or not multiplies_slowly(x):
        return F.linear(x, weight.to(x.dtype), bias)
    out = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return out.to(x.dtype)


def _int8_linear(x: Tensor, weight: Int8Weight) -> Tensor:
    split = split_outliers(x, weight.outlier_threshold)
    quantized, row_scales = quantize_rows(x if split is None else split[0])
    out = int8_matmul(quantized, weight.data).float() * row_scales
    if split is not None:
        _, columns, outliers = split
        out += outliers.float() @ weight.data[:, columns].float().t()
    out = (out * weight.scales).to(x.dtype)
    return out if weight.bias is None else out + weight.bias
