"""Weights of linear layers in the layouts that the matmuls want.

Rounding (how a float becomes an int8 or an int4) is not decided here: these are containers of what
was already rounded. Weights are packed on the machine that runs them and are held once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# "plain" is described with each class, "parts" is that of a ConcatWeight; "triton" is private to
# ``kernels.triton``, the others to ``kernels.cpu``.
Layout = Literal["plain", "amx", "panels", "onednn", "native", "aten", "triton", "parts"]
Activations = Literal["none", "dynamic", "static"]


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@dataclass(frozen=True, slots=True)
class DenseWeight:
    """A floating-point weight. ``data`` is [N, K] in layout "plain"."""

    data: Tensor
    bias: Tensor | None
    shape: tuple[int, int]
    layout: Layout = "plain"

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the stored elements."""
        return self.data.dtype

    @property
    def nbytes(self) -> int:
        """Bytes held, bias included."""
        return _bytes(self.data, self.bias)


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """Symmetric int8 per output channel: ``w[n, k] = data[n, k] * scales[n]``.

    Activations are quantized per row when it is applied (W8A8 dynamic). With an
    ``outlier_threshold`` above 0, elements of a row at or above it in magnitude are left out of
    that and multiplied in floating point (LLM.int8()).
    ``data`` is int8 [N, K] in layout "plain"; ``scales`` is float32 [N].
    """

    data: Tensor
    scales: Tensor
    bias: Tensor | None
    shape: tuple[int, int]
    layout: Layout = "plain"
    outlier_threshold: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the stored elements."""
        return torch.int8

    @property
    def nbytes(self) -> int:
        """Bytes held, scales and bias included."""
        return _bytes(self.data, self.scales, self.bias)


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """Asymmetric int4 in groups along K: ``w[n, k] = (q[n, k] - zeros[n, g]) * scales[n, g]``.

    ``data`` is uint8 [N, K / 2] in layout "plain", even k in the low nibble. ``scales`` and
    ``zeros`` are float32 [N, K / group_size] in layout "plain". The columns are those of
    ``x[:, permutation]`` where there is a ``permutation`` (int64 [K]).
    """

    data: Tensor
    scales: Tensor
    zeros: Tensor
    bias: Tensor | None
    shape: tuple[int, int]
    group_size: int
    layout: Layout = "plain"
    permutation: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the stored elements (two to a byte)."""
        return torch.uint8

    @property
    def nbytes(self) -> int:
        """Bytes held, scales, zeros, permutation and bias included."""
        return _bytes(self.data, self.scales, self.zeros, self.permutation, self.bias)


@dataclass(frozen=True, slots=True)
class Int8GroupWeight:
    """Weight-only int8 in groups along K: ``w[n, k] = (data[n, k] - zeros[n, g]) * scales[n, g]``.

    ``data`` is int8 [N, K], ``scales`` and ``zeros`` are float32 [N, K / group_size] in layout
    "plain"; ``permutation`` as in Int4Weight.
    """

    data: Tensor
    scales: Tensor
    zeros: Tensor
    bias: Tensor | None
    shape: tuple[int, int]
    group_size: int
    layout: Layout = "plain"
    permutation: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the stored elements."""
        return torch.int8

    @property
    def nbytes(self) -> int:
        """Bytes held, scales, zeros, permutation and bias included."""
        return _bytes(self.data, self.scales, self.zeros, self.permutation, self.bias)


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """FP8 e4m3: ``w = data * scale``.

    ``data`` is float8_e4m3fn [N, K] in layout "plain". ``scales`` is float32 [N], or by blocks of
    ``block_shape`` (rows, columns) [ceil(N / rows), ceil(K / columns)]. ``activations`` "dynamic"
    rounds each row of x to e4m3 by its own maximum (of each block of columns), "static" by
    ``input_scale`` (float32 [1]), "none" leaves x as it is.
    """

    data: Tensor
    scales: Tensor
    bias: Tensor | None
    shape: tuple[int, int]
    block_shape: tuple[int, int] | None = None
    activations: Activations = "dynamic"
    input_scale: Tensor | None = None
    layout: Layout = "plain"

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the stored elements."""
        return torch.float8_e4m3fn

    @property
    def nbytes(self) -> int:
        """Bytes held, scales and bias included."""
        return _bytes(self.data, self.scales, self.input_scale, self.bias)


@dataclass(frozen=True, slots=True)
class Table4Weight:
    """Four bits that look up one of 16 floats: ``w[n, k] = table[q[n, k]] * scales[n, g]``.

    ``data`` is uint8 [N, K / 2], even k in the low nibble, and ``scales`` float32
    [N, K / group_size] in layout "plain"; ``table`` is float32 [16].
    """

    data: Tensor
    scales: Tensor
    table: Tensor
    bias: Tensor | None
    shape: tuple[int, int]
    group_size: int
    layout: Layout = "plain"

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the stored elements (two to a byte)."""
        return torch.uint8

    @property
    def nbytes(self) -> int:
        """Bytes held, scales, table and bias included."""
        return _bytes(self.data, self.scales, self.table, self.bias)


@dataclass(frozen=True, slots=True)
class ConcatWeight:
    """Several weights of one K applied to the same rows, their outputs side by side."""

    parts: tuple[LinearWeight, ...]
    shape: tuple[int, int]
    layout: Layout = "parts"

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the first part's stored elements."""
        return self.parts[0].dtype

    @property
    def bias(self) -> Tensor | None:
        """None: each part adds its own."""
        return None

    @property
    def nbytes(self) -> int:
        """Bytes held by all parts."""
        return sum(part.nbytes for part in self.parts)


LinearWeight = (
    DenseWeight
    | Int8Weight
    | Int4Weight
    | Int8GroupWeight
    | Fp8Weight
    | Table4Weight
    | ConcatWeight
)


def pack_nibbles(q: Tensor) -> Tensor:
    """Integers 0..15 [N, K] -> uint8 [N, K / 2], even k in the low nibble."""
    q = q.to(torch.uint8)
    return (q[:, 0::2] | (q[:, 1::2] << 4)).contiguous()


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 [N, K / 2] -> uint8 [N, K], the inverse of ``pack_nibbles``."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
