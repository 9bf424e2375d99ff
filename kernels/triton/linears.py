"""Linear layers in layout "triton": which format is packed, multiplied and widened by which module.

Columns are as the weight stores them: ``kernels.linears`` permutes rows of x before.
"""

from typing import Protocol

from torch import Tensor

from kernels.triton import fp8_linear, int8_linear, weight_only
from kernels.weights import LinearWeight


class Formats(Protocol):
    """A module that packs some formats, and multiplies by what it packed."""

    def pack(self, weight: LinearWeight) -> LinearWeight | None:
        """A plain weight as the module's kernel wants it; None where it takes no such weight."""

    def takes(self, weight: LinearWeight) -> bool:
        """Whether a weight in layout "triton" is the module's."""

    def linear(self, rows: Tensor, weight: LinearWeight) -> Tensor:
        """``rows @ w.T + bias``; rows [M, K] -> [M, N] in rows' dtype."""

    def dequantize(self, weight: LinearWeight) -> Tensor:
        """The weight [N, K] in float32."""


# The first that packs a weight has it.
FORMATS: tuple[Formats, ...] = (int8_linear, fp8_linear, weight_only)


def pack(weight: LinearWeight) -> LinearWeight | None:
    """A weight in layout "plain" as a kernel wants it; None where no kernel takes it."""
    for module in FORMATS:
        packed = module.pack(weight)
        if packed is not None:
            return packed
    return None


def linear(rows: Tensor, weight: LinearWeight) -> Tensor:
    """``rows @ w.T + bias``; rows [M, K] of any stride between rows -> [M, N] in rows' dtype."""
    for module in FORMATS:
        if module.takes(weight):
            return module.linear(rows, weight)
    raise TypeError(f"no kernel for {type(weight).__name__} in layout {weight.layout!r}")


def dequantize(weight: LinearWeight) -> Tensor:
    """The weight [N, K] that ``linear`` multiplies by, in float32."""
    for module in FORMATS:
        if module.takes(weight):
            return module.dequantize(weight)
    raise TypeError(f"no kernel for {type(weight).__name__} in layout {weight.layout!r}")
