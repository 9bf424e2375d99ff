"""Linear layers on AMX tiles: packing weights into panels, and the calls.

Panels are described in ``native/amx_matmul.cpp``. A row's result does not depend on the rows it is
computed with, to the last bit, whatever their number.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.native import DTYPE_CODES, has_amx, library
from kernels.weights import (
    DenseWeight,
    Fp8Weight,
    Int4Weight,
    Int8GroupWeight,
    Int8Weight,
    LinearWeight,
    Table4Weight,
)

PANEL = 32  # output columns per panel
TILE = 16  # columns, and rows of 4 bytes of K, per tile
INT4_STEP = 32  # positions of K per step; a group must hold whole steps

_DENSE, _INT8, _INT4 = 0, 1, 2


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


def _group_panels(values: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, groups] -> [panels, groups, 32]."""
    padded = F.pad(values.to(dtype), (0, 0, 0, -values.shape[0] % PANEL))
    return padded.view(-1, PANEL, values.shape[1]).transpose(1, 2).contiguous()


def _wide_bias(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()


def pack_dense(weight: Tensor, bias: Tensor | None) -> DenseWeight | None:
    """Panels of a bf16 weight; None where AMX is not to be had or another dtype is asked."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not has_amx():
        return None
    shape = (weight.shape[0], weight.shape[1])
    return DenseWeight(to_panels(weight), _wide_bias(bias), shape, "amx")


def pack_int8(weight: Int8Weight) -> Int8Weight | None:
    """Panels of a plain int8 weight; None where AMX is not to be had or outliers are split off."""
    if weight.data.device.type != "cpu" or weight.outlier_threshold or not has_amx():
        return None
    panels, bias = to_panels(weight.data), _wide_bias(weight.bias)
    return replace(weight, data=panels, scales=weight.scales.contiguous(), bias=bias, layout="amx")


def pack_int8_groups(weight: Int8GroupWeight) -> Int8GroupWeight | None:
    """None."""
    return None


def pack_fp8(weight: Fp8Weight) -> Fp8Weight | None:
    """None."""
    return None


def pack_table4(
    q: Tensor, scales: Tensor, table: Tensor, group_size: int, bias: Tensor | None
) -> Table4Weight | None:
    """None."""
    return None


def pack_int4(
    q: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group_size: int,
    bias: Tensor | None,
    permutation: Tensor | None,
) -> Int4Weight | None:
    """Panels of an int4 weight; None where AMX is not to be had or groups split a step."""
    if q.device.type != "cpu" or group_size % INT4_STEP or not has_amx():
        return None
    half_rows = to_panels(q.to(torch.uint8)).view(
        -1, 2, 4, 4, 2, TILE
    )  # tile, vector, byte, nibble
    data = (half_rows[..., 0, :] | (half_rows[..., 1, :] << 4)).transpose(-1, -2).contiguous()
    return Int4Weight(
        data,
        _group_panels(scales, torch.float32),
        _group_panels(zeros, torch.float16),
        _wide_bias(bias),
        (q.shape[0], q.shape[1]),
        group_size,
        "amx",
        permutation,
    )


def _call(x: Tensor, weight: LinearWeight, out_dtype: torch.dtype) -> Tensor:
    native = library()
    if native is None:
        raise RuntimeError("this weight is packed for AMX, which is switched off")
    n, k = weight.shape
    rows = x.shape[0]
    out = torch.empty((rows, n), dtype=out_dtype)
    if rows == 0:
        return out  # tiles have at least one row
    kind, scales, zeros, group = _DENSE, None, None, 0
    if isinstance(weight, Int8Weight):
        kind, scales = _INT8, weight.scales.data_ptr()
    elif isinstance(weight, Int4Weight):
        kind, scales, zeros = _INT4, weight.scales.data_ptr(), weight.zeros.data_ptr()
        group = weight.group_size
    native.amx_linear(
        kind,
        DTYPE_CODES[x.dtype],
        x.data_ptr(),
        x.stride(0),
        rows,
        weight.data.data_ptr(),
        scales,
        zeros,
        n,
        k,
        group,
        None if weight.bias is None else weight.bias.data_ptr(),
        out.data_ptr(),
        DTYPE_CODES[out_dtype],
        torch.get_num_threads(),
    )
    return out


def linear(x: Tensor, weight: LinearWeight) -> Tensor:
    """``x @ w.T + bias`` for a weight in layout "amx"; x [M, K] with contiguous rows."""
    if x.stride(1) != 1:
        x = x.contiguous()
    if x.dtype == torch.bfloat16 or isinstance(weight, Int8Weight):
        return _call(x, weight, x.dtype)
    # Tiles multiply bf16: wider activations go as a bf16 value and its bf16 remainder, which keeps
    # 16 bits of mantissa. Both halves go through one reading of the weight.
    high = x.bfloat16()
    low = (x - high).bfloat16()
    halves = _call(torch.cat([high, low]), weight, torch.float32)
    out = halves[: x.shape[0]] + halves[x.shape[0] :]
    return (out if weight.bias is None else out - weight.bias).to(x.dtype)


def dequantize(weight: LinearWeight) -> Tensor:
    """[N, K] of a weight in layout "amx"."""
    if isinstance(weight, DenseWeight):
        return from_panels(weight.data, weight.shape)
    if isinstance(weight, Int8Weight):
        return from_panels(weight.data, weight.shape).float() * weight.scales[:, None]
    # The kernel widens to bf16 as it goes; multiplying by one shows exactly what it multiplies by.
    bare = Int4Weight(
        weight.data,
        weight.scales,
        weight.zeros,
        None,
        weight.shape,
        weight.group_size,
        weight.layout,
    )
    eye = torch.eye(weight.shape[1], dtype=torch.bfloat16)
    return _call(eye, bare, torch.float32).t().contiguous()


def embedding(token_ids: Tensor, weight: DenseWeight) -> Tensor:
    """Rows of a dense weight in layout "amx"; token_ids int64 [T] -> [T, K].

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
