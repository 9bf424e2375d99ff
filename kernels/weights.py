"""Weights of linear layers in the layouts that the matmuls want.

Rounding (how a float becomes an int8 or an int4) is not decided here: these are containers of what
was already rounded. Weights are packed on the machine that runs them and are held once.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# "plain" is described with each class; the others are private to ``kernels.cpu``.
Layout = Literal["plain", "amx", "onednn", "native", "aten"]


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

    Activations are quantized per row when it is applied (W8A8 dynamic).
    ``data`` is int8 [N, K] in layout "plain"; ``scales`` is float32 [N].
    """

    data: Tensor
    scales: Tensor
    bias: Tensor | None
    shape: tuple[int, int]
    layout: Layout = "plain"

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

    ``data`` is uint8 [N, K / 2] in layout "plain", even k in the low nibble.
    ``scales`` and ``zeros`` are float32 [N, K / group_size] in layout "plain".
    """

    data: Tensor
    scales: Tensor
    zeros: Tensor
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
        """Bytes held, scales, zeros and bias included."""
        return _bytes(self.data, self.scales, self.zeros, self.bias)


LinearWeight = DenseWeight | Int8Weight | Int4Weight


def check_int8(q: Tensor, scales: Tensor) -> None:
    """Raise ValueError unless q is int8 [N, K] and scales has N elements."""
    if q.dtype != torch.int8 or q.dim() != 2:
        raise ValueError(f"int8 weight must be int8 [N, K], got {q.dtype} {tuple(q.shape)}")
    if scales.numel() != q.shape[0]:
        raise ValueError(f"int8 weight has {q.shape[0]} rows but {scales.numel()} scales")


def check_int4(q: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> None:
    """Raise ValueError unless q is 0..15, [N, K], with [N, K / group_size] scales and zeros."""
    if q.dim() != 2 or q.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32):
        raise ValueError(f"int4 weight must be integers [N, K], got {q.dtype} {tuple(q.shape)}")
    n, k = q.shape
    if group_size < 1 or k % group_size or k % 2:
        raise ValueError(f"group size {group_size} does not divide an even K, K is {k}")
    expected = (n, k // group_size)
    if tuple(scales.shape) != expected or tuple(zeros.shape) != expected:
        raise ValueError(
            f"int4 weight needs scales and zeros of {expected}, "
            f"got {tuple(scales.shape)} and {tuple(zeros.shape)}"
        )
    if q.numel() and (int(q.min()) < 0 or int(q.max()) > 15):
        raise ValueError("int4 weight holds values outside 0..15")


def pack_nibbles(q: Tensor) -> Tensor:
    """Integers 0..15 [N, K] -> uint8 [N, K / 2], even k in the low nibble."""
    q = q.to(torch.uint8)
    return (q[:, 0::2] | (q[:, 1::2] << 4)).contiguous()


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 [N, K / 2] -> uint8 [N, K], the inverse of ``pack_nibbles``."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
