"""Quantized linear layers on CPUs without AMX: oneDNN's and ATen's packed layouts, native int4."""

from dataclasses import replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import plain_linear
from kernels.cpu.native import DTYPE_CODES, library
from kernels.slow_dtypes import multiplies_slowly
from kernels.weights import Int4Weight, Int8Weight, pack_nibbles

ATEN_GROUPS = (32, 64, 128, 256)
NATIVE_STEP = 32  # the native int4 kernel reads so many weights at once; groups hold whole steps
FEW_ROWS = 8  # up to so many rows are multiplied without widening the weight first


def _onednn_matmul(rows: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """int8 [M, K] x packed [N, K] * scales[N] -> float32 [M, N]."""
    zeros = torch.zeros(scales.shape[0], dtype=torch.int32)
    out: Tensor = torch.ops.onednn.qlinear_pointwise(
        rows, 1.0, 0, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return out


@cache
def onednn_is_exact() -> bool:
    """Whether oneDNN's int8 matmul exists and sums exactly on this CPU.

    Without VNNI its kernels add pairs of products in 16 bits, which saturate.
    """
    try:
        q = torch.full((16, 64), 127, dtype=torch.int8)
        packed = torch.ops.onednn.qlinear_prepack(q, None)
        out = _onednn_matmul(torch.cat([q, -q]), packed, torch.ones(16))
    except (RuntimeError, AttributeError):
        return False
    expected = torch.full((32, 16), 127.0 * 127.0 * 64.0)
    expected[16:] *= -1
    return torch.equal(out, expected)


def pack_int8(weight: Int8Weight) -> Int8Weight | None:
    """A plain weight in oneDNN's layout; None where it is not to be had or not exact."""
    if weight.data.device.type != "cpu" or not onednn_is_exact():
        return None
    packed = torch.ops.onednn.qlinear_prepack(weight.data, None)
    return replace(weight, data=packed, scales=weight.scales.contiguous(), layout="onednn")


def pack_int4(
    q: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group_size: int,
    bias: Tensor | None,
    permutation: Tensor | None,
) -> Int4Weight | None:
    """Nibbles for the native kernel, or ATen's layout; None where neither takes these groups."""
    if q.device.type != "cpu":
        return None
    n, k = q.shape
    if library() is not None and group_size % NATIVE_STEP == 0:
        wide = None if bias is None else bias.float().contiguous()
        parts = (scales.float().contiguous(), zeros.float().contiguous())
        return Int4Weight(pack_nibbles(q), *parts, wide, (n, k), group_size, "native", permutation)
    if n % 16 or group_size not in ATEN_GROUPS:
        return None
    data = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.to(torch.int32).contiguous(), 1)
    parts = (scales.float(), zeros.float())
    return Int4Weight(data, *parts, bias, (n, k), group_size, "aten", permutation)


def int8_linear(x: Tensor, weight: Int8Weight) -> Tensor:
    """x [M, K] against a weight in layout "onednn"."""
    split = plain_linear.split_outliers(x, weight.outlier_threshold)
    rows, row_scales = plain_linear.quantize_rows(x if split is None else split[0])
    out = _onednn_matmul(rows, weight.data, weight.scales) * row_scales
    if split is not None:
        _, columns, outliers = split
        out += outliers.float() @ _onednn_columns(weight, columns)
    out = out.to(x.dtype)
    return out if weight.bias is None else out + weight.bias


def _onednn_columns(weight: Int8Weight, columns: Tensor) -> Tensor:
    """float32 [C, N]: the chosen columns of a layout that only a matmul can read back."""
    chosen = F.one_hot(columns, weight.shape[1]).to(torch.int8)
    return _onednn_matmul(chosen, weight.data, weight.scales)


def dequantize_int8(weight: Int8Weight) -> Tensor:
    """float32 [N, K] of a weight in layout "onednn"."""
    return _onednn_columns(weight, torch.arange(weight.shape[1])).t().contiguous()


def _aten_int4(x: Tensor, weight: Int4Weight) -> Tensor:
    # ATen's convention is w = (q - 8) * s + z.
    shifts = (8 - weight.zeros) * weight.scales
    pairs = torch.stack([weight.scales, shifts], dim=-1).transpose(0, 1).contiguous().to(x.dtype)
    out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
        x.contiguous(), weight.data, weight.group_size, pairs
    )
    return out


def widen(weight: Int4Weight, dtype: torch.dtype) -> Tensor:
    """[N, K] in ``dtype`` of a weight in layout "native" or "aten"."""
    n, k = weight.shape
    if weight.layout == "aten":
        return _aten_int4(torch.eye(k), weight).t().to(dtype).contiguous()
    native = library()
    if native is None:
        raise RuntimeError("this weight is packed for the native kernels, which are switched off")
    out = torch.empty((n, k), dtype=dtype)
    native.int4_widen(
        DTYPE_CODES[dtype],
        weight.data.data_ptr(),
        weight.scales.data_ptr(),
        weight.zeros.data_ptr(),
        n,
        k,
        weight.group_size,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def int4_linear(x: Tensor, weight: Int4Weight) -> Tensor:
    """x [M, K] against a weight in layout "native" or "aten"."""
    n, k = weight.shape
    rows = x.shape[0]
    if weight.layout == "aten":
        out = _aten_int4(x, weight) if rows else x.new_empty((0, n))
        return out if weight.bias is None else out + weight.bias
    native = library()
    if rows > FEW_ROWS or native is None:
        bias = None if weight.bias is None else weight.bias.to(x.dtype)
        dtype = torch.float32 if multiplies_slowly(x) else x.dtype
        return plain_linear.float_linear(x, widen(weight, dtype), bias)
    wide = x.float().contiguous()
    out = torch.empty((rows, n))
    native.int4_linear(
        wide.data_ptr(),
        rows,
        weight.data.data_ptr(),
        weight.scales.data_ptr(),
        weight.zeros.data_ptr(),
        n,
        k,
        weight.group_size,
        None if weight.bias is None else weight.bias.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out.to(x.dtype)
