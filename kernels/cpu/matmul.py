"""Linear layers of weights in panels: packing, and the calls.

On AMX tiles in layout "amx". Without them dense weights alone, in layout "panels", where the CPU
has no products of bf16 either. Panels are described in ``native/amx_matmul.cpp``. A row's result
does not depend on the rows it is computed with, to the last bit, whatever their number.
"""

import ctypes
import math
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.native import DTYPE_CODES, has_amx, library
from kernels.slow_dtypes import multiplies_slowly
from kernels.weights import (
    ConcatWeight,
    DenseWeight,
    Fp8Weight,
    Int4Weight,
    Int8GroupWeight,
    Int8Weight,
    Layout,
    LinearWeight,
    Table4Weight,
)

PANEL = 32  # output columns per panel
TILE = 16  # columns, and rows of 4 bytes of K, per tile
STEP = 32  # positions of K widened at once; a group must hold whole steps

# As in ``native/amx_widen.h`` and ``native/amx_rows.h``; a dense weight is 0.
_INT8, _INT4, _TABLE4, _INT8_GROUPS, _FP8, _FP8_BLOCKS = 1, 2, 3, 4, 5, 6
_ROW_BF16, _ROW_INT8, _ROW_FP8, _ROW_FP8_STATIC = 0, 1, 2, 3


def to_panels(weight: Tensor) -> Tensor:
    """[N, K] -> [panels, steps, 2, 16 rows, 16 columns, 4 bytes' worth of K], zero padded."""
    per_row = 4 // weight.element_size() if weight.dtype != torch.uint8 else 2
    n, k = weight.shape
    padded = F.pad(weight, (0, -k % (TILE * per_row), 0, -n % PANEL))
    tiles = padded.view(-1, 2, TILE, padded.shape[1] // (TILE * per_row), TILE, per_row)
    return tiles.permute(0, 3, 1, 4, 2, 5).contiguous()


def from_panels(panels: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of ``to_panels``."""
    count, steps, _, _, _, per_row = panels.shape
    flat = panels.permute(0, 2, 4, 1, 3, 5).reshape(count * PANEL, steps * TILE * per_row)
    return flat[: shape[0], : shape[1]].contiguous()


def _group_panels(values: Tensor) -> Tensor:
    """[N, groups] -> [panels, groups, 32], in float16 where that holds every value exactly."""
    half = values.to(torch.float16)
    exact = torch.equal(half.float(), values.float())
    padded = F.pad(half if exact else values.float(), (0, 0, 0, -values.shape[0] % PANEL))
    return padded.view(-1, PANEL, values.shape[1]).transpose(1, 2).contiguous()


def _zero_panels(zeros: Tensor) -> Tensor:
    """As ``_group_panels``, but [32] where one zero serves all, as in symmetric formats."""
    if zeros.numel() and bool((zeros == zeros[0, 0]).all()):
        return zeros[0, 0].float().expand(PANEL).contiguous()
    return _group_panels(zeros)


def _nibble_panels(q: Tensor) -> Tensor:
    """Integers 0..15 [N, K] -> panels of nibbles, 8 half rows of a tile to a dword."""
    half_rows = to_panels(q.to(torch.uint8)).view(
        -1, 2, 4, 4, 2, TILE
    )  # tile, vector, byte, nibble
    return (half_rows[..., 0, :] | (half_rows[..., 1, :] << 4)).transpose(-1, -2).contiguous()


def _fp8_panels(data: Tensor) -> Tensor:
    """e4m3 [N, K] -> panels of bytes; of two rows of a tile, 8 bytes lie in turn."""
    panels = to_panels(data.view(torch.uint8))
    rows = panels.view(*panels.shape[:3], 8, 2, 4, 8)
    return rows.transpose(-3, -2).reshape(panels.shape)


def _from_fp8_panels(data: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of ``_fp8_panels``."""
    rows = data.view(*data.shape[:3], 8, 4, 2, 8).transpose(-3, -2)
    return from_panels(rows.reshape(data.shape), shape).view(torch.float8_e4m3fn)


def _wide_bias(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()


def _takes_groups(data: Tensor, group_size: int) -> bool:
    return data.device.type == "cpu" and group_size % STEP == 0 and has_amx()


def pack_dense(weight: Tensor, bias: Tensor | None) -> DenseWeight | None:
    """Panels of a bf16 weight; None where PyTorch multiplies it as well, or of another dtype."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or library() is None:
        return None
    if not has_amx() and not multiplies_slowly(weight):
        return None
    return in_panels(weight, bias, "amx" if has_amx() else "panels")


def in_panels(weight: Tensor, bias: Tensor | None, layout: Layout) -> DenseWeight:
    """Panels of a bf16 weight."""
    shape = (weight.shape[0], weight.shape[1])
    return DenseWeight(to_panels(weight), _wide_bias(bias), shape, layout)


def pack_int8(weight: Int8Weight) -> Int8Weight | None:
    """Panels of a plain int8 weight; None where AMX is not to be had."""
    if weight.data.device.type != "cpu" or not has_amx():
        return None
    panels, bias = to_panels(weight.data), _wide_bias(weight.bias)
    return replace(weight, data=panels, scales=weight.scales.contiguous(), bias=bias, layout="amx")


def pack_int4(
    q: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group_size: int,
    bias: Tensor | None,
    permutation: Tensor | None,
) -> Int4Weight | None:
    """Panels of an int4 weight; None where AMX is not to be had or groups split a step."""
    if not _takes_groups(q, group_size):
        return None
    grid = (_group_panels(scales), _zero_panels(zeros))
    shape = (q.shape[0], q.shape[1])
    return Int4Weight(
        _nibble_panels(q), *grid, _wide_bias(bias), shape, group_size, "amx", permutation
    )


def pack_int8_groups(weight: Int8GroupWeight) -> Int8GroupWeight | None:
    """Panels of a plain weight; None where AMX is not to be had or groups split a step."""
    if not _takes_groups(weight.data, weight.group_size):
        return None
    return replace(
        weight,
        data=to_panels(weight.data.view(torch.uint8)),
        scales=_group_panels(weight.scales),
        zeros=_zero_panels(weight.zeros),
        bias=_wide_bias(weight.bias),
        layout="amx",
    )


def pack_fp8(weight: Fp8Weight) -> Fp8Weight | None:
    """Panels of a plain weight; None where AMX is not to be had or blocks split panels or steps.

    Scales by channel stay [N]; those of blocks become [panels, column blocks].
    """
    rows, columns = weight.block_shape or (PANEL, STEP)
    if rows % PANEL or not _takes_groups(weight.data, columns):
        return None
    scales = weight.scales
    if weight.block_shape is not None:
        scales = scales.repeat_interleave(rows // PANEL, 0)[: -(-weight.shape[0] // PANEL)]
    data, bias = _fp8_panels(weight.data), _wide_bias(weight.bias)
    return replace(weight, data=data, scales=scales.contiguous(), bias=bias, layout="amx")


def pack_table4(
    q: Tensor, scales: Tensor, table: Tensor, group_size: int, bias: Tensor | None
) -> Table4Weight | None:
    """Panels of a table's indices; None where AMX is not to be had or groups split a step."""
    if not _takes_groups(q, group_size):
        return None
    parts = (_group_panels(scales), table.float().flatten().contiguous())
    shape = (q.shape[0], q.shape[1])
    return Table4Weight(_nibble_panels(q), *parts, _wide_bias(bias), shape, group_size, "amx")


class _AmxWeight(ctypes.Structure):
    """``Weight`` of ``native/amx_widen.h``."""

    _fields_: ClassVar = [
        *((name, ctypes.c_void_p) for name in ("data", "scales", "zeros", "table", "bias")),
        *((name, ctypes.c_int64) for name in ("n", "k", "group_size")),
        *(
            (name, ctypes.c_int32)
            for name in ("kind", "scales_dtype", "zeros_dtype", "zeros_shared")
        ),
    ]


def _describe(weight: LinearWeight) -> _AmxWeight:
    """The weight as the native code sees it."""
    assert not isinstance(weight, ConcatWeight)
    about = _AmxWeight()
    about.n, about.k = weight.shape
    about.data = weight.data.data_ptr()
    if weight.bias is not None:
        about.bias = weight.bias.data_ptr()
    if isinstance(weight, DenseWeight):
        return about
    about.scales = weight.scales.data_ptr()
    about.scales_dtype = DTYPE_CODES[weight.scales.dtype]
    if isinstance(weight, Int8Weight):
        about.kind = _INT8
    elif isinstance(weight, Fp8Weight):
        if weight.block_shape is None:
            about.kind = _FP8
        else:
            about.kind, about.group_size = _FP8_BLOCKS, weight.block_shape[1]
    elif isinstance(weight, Table4Weight):
        about.kind, about.group_size = _TABLE4, weight.group_size
        about.table = weight.table.data_ptr()
    else:
        about.kind = _INT4 if isinstance(weight, Int4Weight) else _INT8_GROUPS
        about.group_size = weight.group_size
        about.zeros = weight.zeros.data_ptr()
        about.zeros_dtype = DTYPE_CODES[weight.zeros.dtype]
        about.zeros_shared = weight.zeros.dim() == 1
    return about


def _rounding(weight: LinearWeight) -> tuple[int, int, float]:
    """What becomes of the rows of x: kind, columns that share a scale (0: all), parameter."""
    if isinstance(weight, Int8Weight):
        return _ROW_INT8, 0, weight.outlier_threshold or math.inf
    if not isinstance(weight, Fp8Weight) or weight.activations == "none":
        return _ROW_BF16, 0, 0.0
    if weight.activations == "static":
        assert weight.input_scale is not None
        return _ROW_FP8_STATIC, 0, float(weight.input_scale)
    return _ROW_FP8, 0 if weight.block_shape is None else weight.block_shape[1], 0.0


def _call(
    x: Tensor, weight: LinearWeight, out_dtype: torch.dtype, rounding: tuple[int, int, float]
) -> Tensor:
    native = library()
    if native is None:
        raise RuntimeError("this weight is packed for AMX, which is switched off")
    rows = x.shape[0]
    out = torch.empty((rows, weight.shape[0]), dtype=out_dtype)
    if rows == 0:
        return out  # tiles have at least one row
    native.amx_linear(
        ctypes.byref(_describe(weight)),
        DTYPE_CODES[x.dtype],
        x.data_ptr(),
        x.stride(0),
        rows,
        *rounding,
        out.data_ptr(),
        DTYPE_CODES[out_dtype],
        torch.get_num_threads(),
    )
    return out


def _wide_call(x: Tensor, weight: DenseWeight) -> Tensor:
    native = library()
    if native is None:
        raise RuntimeError("this weight is packed for the native kernels, which are switched off")
    rows, (n, k) = x.shape[0], weight.shape
    out = torch.empty((rows, n), dtype=x.dtype)
    if rows == 0:
        return out
    native.panel_linear(
        weight.data.data_ptr(),
        None if weight.bias is None else weight.bias.data_ptr(),
        n,
        k,
        DTYPE_CODES[x.dtype],
        x.data_ptr(),
        x.stride(0),
        rows,
        out.data_ptr(),
        DTYPE_CODES[x.dtype],
        torch.get_num_threads(),
    )
    return out


def linear(x: Tensor, weight: LinearWeight) -> Tensor:
    """``x @ w.T + bias`` for a weight in layout "amx" or "panels"; x [M, K]."""
    if x.stride(1) != 1:
        x = x.contiguous()
    if weight.layout == "panels":
        assert isinstance(weight, DenseWeight)
        return _wide_call(x, weight)
    rounding = _rounding(weight)
    if x.dtype == torch.bfloat16 or rounding[0] != _ROW_BF16:
        return _call(x, weight, x.dtype, rounding)
    # Tiles multiply bf16: wider activations go as a bf16 value and its bf16 remainder, which keeps
    # 16 bits of mantissa. Both halves go through one reading of the weight.
    high = x.bfloat16()
    low = (x - high).bfloat16()
    halves = _call(torch.cat([high, low]), weight, torch.float32, rounding)
    out = halves[: x.shape[0]] + halves[x.shape[0] :]
    return (out if weight.bias is None else out - weight.bias).to(x.dtype)


def dequantize(weight: LinearWeight) -> Tensor:
    """[N, K] of a weight in layout "amx" or "panels"."""
    assert not isinstance(weight, ConcatWeight)
    if isinstance(weight, DenseWeight):
        return from_panels(weight.data, weight.shape)
    if isinstance(weight, Int8Weight):
        return from_panels(weight.data, weight.shape).float() * weight.scales[:, None]
    if isinstance(weight, Fp8Weight) and weight.block_shape is None:
        return _from_fp8_panels(weight.data, weight.shape).float() * weight.scales[:, None]
    # The kernel widens to bf16 as it goes; multiplying by one shows exactly what it multiplies by.
    bare = replace(weight, bias=None)
    n, k = weight.shape
    out = torch.empty((n, k))
    for begin in range(0, k, 1024):
        ones = torch.zeros(min(1024, k - begin), k, dtype=torch.bfloat16)
        ones.diagonal(begin).fill_(1)
        columns = _call(ones, bare, torch.float32, (_ROW_BF16, 0, 0.0))
        out[:, begin : begin + 1024] = columns.t()
    return out


def embedding(token_ids: Tensor, weight: DenseWeight) -> Tensor:
    """Rows of a dense weight in panels; token_ids int64 [T] -> [T, K].

    Raises IndexError for an id outside the table, as PyTorch's own embedding does.
    """
    native = library()
    if native is not None and token_ids.dtype == torch.int64:
        count, (n, k) = token_ids.shape[0], weight.shape
        ids = token_ids.contiguous()
        if count:
            low, high = (int(bound) for bound in torch.aminmax(ids))
            if low < 0 or high >= n:
                raise IndexError(f"token id {low if low < 0 else high} is outside 0..{n - 1}")
        out = torch.empty((count, k), dtype=weight.dtype)
        native.panel_embedding(
            weight.data.data_ptr(),
            ids.data_ptr(),
            count,
            k,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out
    column = token_ids % PANEL
    rows = weight.data[token_ids // PANEL, :, column // TILE, :, column % TILE, :]
    return rows.reshape(token_ids.shape[0], -1)[:, : weight.shape[1]].contiguous()
