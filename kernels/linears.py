"""Linear layers: packing each weight format for the machine at hand, and multiplying by it."""

import importlib
from functools import cache
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor

from kernels import plain_linear
from kernels.cpu import matmul as cpu_matmul
from kernels.cpu import packed as cpu_packed
from kernels.triton import runtime
from kernels.weight_checks import (
    check_fp8,
    check_int4,
    check_int8,
    check_int8_groups,
    check_permutation,
    check_table4,
)
from kernels.weights import (
    Activations,
    ConcatWeight,
    DenseWeight,
    Fp8Weight,
    Int4Weight,
    Int8GroupWeight,
    Int8Weight,
    LinearWeight,
    Table4Weight,
    pack_nibbles,
)

Weight = TypeVar("Weight", bound=LinearWeight)


class _TritonLinears(Protocol):
    def pack(self, weight: LinearWeight) -> LinearWeight | None: ...

    def linear(self, x: Tensor, weight: LinearWeight) -> Tensor: ...

    def dequantize(self, weight: LinearWeight) -> Tensor: ...


@cache
def _triton() -> _TritonLinears:
    # Imported when first needed: a machine without a GPU has no use for Triton and may lack it.
    linears: _TritonLinears = importlib.import_module("kernels.triton.linears")
    return linears


def _for_triton(weight: Weight) -> Weight:
    """A plain weight as Triton's kernels want it, or as it is where they decline it."""
    return cast(Weight, _triton().pack(weight) or weight)


def pack_dense(weight: Tensor, bias: Tensor | None = None) -> DenseWeight:
    """Lay out a float weight [N, K] for ``linear``; bias [N] in the same dtype."""
    packed = None if runtime.runs_on(weight) else cpu_matmul.pack_dense(weight, bias)
    if packed is not None:
        return packed
    return DenseWeight(weight.contiguous(), bias, (weight.shape[0], weight.shape[1]))


def pack_int8(
    q: Tensor, scales: Tensor, bias: Tensor | None = None, outlier_threshold: float = 0.0
) -> Int8Weight:
    """Lay out int8 [N, K] with per-output-channel ``scales`` [N]: ``w = q * scales[:, None]``.

    Activations at or above ``outlier_threshold`` in magnitude are multiplied in floating point; 0
    turns that off. Raises ValueError for other shapes or dtypes.
    """
    check_int8(q, scales, outlier_threshold)
    shape = (q.shape[0], q.shape[1])
    weight = Int8Weight(
        q.contiguous(), scales.float().flatten(), bias, shape, "plain", outlier_threshold
    )
    if runtime.runs_on(q):
        return _for_triton(weight)
    return cpu_matmul.pack_int8(weight) or cpu_packed.pack_int8(weight) or weight


def pack_int4(
    q: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group_size: int,
    bias: Tensor | None = None,
    permutation: Tensor | None = None,
) -> Int4Weight:
    """Lay out integers 0..15 [N, K] quantized in groups of ``group_size`` along K.

    ``w[n, k] = (q[n, k] - zeros[n, g]) * scales[n, g]``, g = k // group_size; zeros in units of q,
    any floats. With a ``permutation`` (int64 [K]) the columns of q are those of
    ``x[:, permutation]``. Raises ValueError for other shapes or values.
    """
    check_int4(q, scales, zeros, group_size)
    check_permutation(permutation, q.shape[1])
    for_triton = runtime.runs_on(q)
    for pack in () if for_triton else (cpu_matmul.pack_int4, cpu_packed.pack_int4):
        packed = pack(q, scales, zeros, group_size, bias, permutation)
        if packed is not None:
            return packed
    shape, wide = (q.shape[0], q.shape[1]), (scales.float(), zeros.float())
    weight = Int4Weight(pack_nibbles(q), *wide, bias, shape, group_size, "plain", permutation)
    return _for_triton(weight) if for_triton else weight


def pack_int8_groups(
    q: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group_size: int,
    bias: Tensor | None = None,
    permutation: Tensor | None = None,
) -> Int8GroupWeight:
    """Lay out int8 [N, K] quantized in groups along K for activations in floating point.

    ``w[n, k] = (q[n, k] - zeros[n, g]) * scales[n, g]``; zeros and ``permutation`` as in
    ``pack_int4``. Raises ValueError for other shapes or dtypes.
    """
    check_int8_groups(q, scales, zeros, group_size)
    check_permutation(permutation, q.shape[1])
    shape, wide = (q.shape[0], q.shape[1]), (scales.float(), zeros.float())
    weight = Int8GroupWeight(q.contiguous(), *wide, bias, shape, group_size, "plain", permutation)
    if runtime.runs_on(q):
        return _for_triton(weight)
    return cpu_matmul.pack_int8_groups(weight) or weight


def pack_fp8(
    data: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    block_shape: tuple[int, int] | None = None,
    activations: Activations = "dynamic",
    input_scale: Tensor | None = None,
) -> Fp8Weight:
    """Lay out float8_e4m3fn [N, K]; ``scales`` [1], [N], or one for each block.

    Blocks are ``block_shape`` (rows, columns), the last ones cut off by the edges. What becomes of
    activations: see Fp8Weight. Raises ValueError for other shapes or dtypes.
    """
    check_fp8(data, scales, block_shape, activations, input_scale)
    n, k = data.shape
    wide = scales.float()
    if block_shape is None:
        wide = wide.flatten().expand(n).contiguous()
    scale = None if input_scale is None else input_scale.float().reshape(1)
    weight = Fp8Weight(data.contiguous(), wide, bias, (n, k), block_shape, activations, scale)
    if runtime.runs_on(data):
        return _for_triton(weight)
    return cpu_matmul.pack_fp8(weight) or weight


def pack_table4(
    q: Tensor, scales: Tensor, table: Tensor, group_size: int, bias: Tensor | None = None
) -> Table4Weight:
    """Lay out indices 0..15 [N, K] of a ``table`` [16], scaled in groups along K.

    ``w[n, k] = table[q[n, k]] * scales[n, k // group_size]``. Raises ValueError for other shapes
    or values.
    """
    check_table4(q, scales, table, group_size)
    for_triton = runtime.runs_on(q)
    packed = None if for_triton else cpu_matmul.pack_table4(q, scales, table, group_size, bias)
    if packed is not None:
        return packed
    shape, wide = (q.shape[0], q.shape[1]), (scales.float(), table.float().flatten())
    weight = Table4Weight(pack_nibbles(q), *wide, bias, shape, group_size)
    return _for_triton(weight) if for_triton else weight


def concat(parts: list[LinearWeight]) -> LinearWeight:
    """One weight whose outputs are those of ``parts`` side by side.

    Raises ValueError where there are none or they do not take the same rows.
    """
    if not parts or len({part.shape[1] for part in parts}) > 1:
        raise ValueError(f"weights of one K can be joined, got {[part.shape for part in parts]}")
    if len(parts) == 1:
        return parts[0]
    return ConcatWeight(tuple(parts), (sum(part.shape[0] for part in parts), parts[0].shape[1]))


def linear(x: Tensor, weight: LinearWeight) -> Tensor:
    """``x @ w.T + bias``; x [..., K] -> [..., N] in x's dtype.

    Int8 and FP8 with dynamic activations: every row of x is rounded by its own maximum, so no row
    depends on another. Otherwise weights are widened and activations keep their precision.
    """
    if isinstance(weight, ConcatWeight):
        return torch.cat([linear(x, part) for part in weight.parts], dim=-1)
    if isinstance(weight, DenseWeight) and weight.layout == "plain":
        return plain_linear.linear(x, weight)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    permutation = _permutation(weight)
    if permutation is not None:
        rows = rows.index_select(1, permutation)
    if weight.layout in ("amx", "panels"):
        out = cpu_matmul.linear(rows, weight)
    elif weight.layout == "triton":
        out = _triton().linear(rows, weight)
    elif weight.layout == "plain":
        out = plain_linear.linear(rows, weight)
    elif isinstance(weight, Int4Weight):
        out = cpu_packed.int4_linear(rows, weight)
    else:
        assert isinstance(weight, Int8Weight)
        out = cpu_packed.int8_linear(rows, weight)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], weight.shape[0])


def dequantize(weight: LinearWeight) -> Tensor:
    """The weight [N, K] that ``linear`` multiplies by: float32, or a dense weight's own dtype."""
    if isinstance(weight, ConcatWeight):
        parts = [dequantize(part) for part in weight.parts]
        alike = len({part.dtype for part in parts}) == 1
        return torch.cat(parts if alike else [part.float() for part in parts])
    if weight.layout in ("amx", "panels"):
        stored = cpu_matmul.dequantize(weight)
    elif weight.layout == "triton":
        stored = _triton().dequantize(weight)
    elif weight.layout == "plain":
        stored = plain_linear.dequantize(weight)
    elif isinstance(weight, Int4Weight):
        stored = cpu_packed.widen(weight, torch.float32)
    else:
        assert isinstance(weight, Int8Weight)
        stored = cpu_packed.dequantize_int8(weight)
    permutation = _permutation(weight)
    if permutation is None:
        return stored
    return stored[:, torch.argsort(permutation)]


def _permutation(weight: LinearWeight) -> Tensor | None:
    return weight.permutation if isinstance(weight, (Int4Weight, Int8GroupWeight)) else None
