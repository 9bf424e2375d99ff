"""Weights of a mixture's experts side by side, and the product that takes each row to its own.

Where Triton runs, rows are sorted by expert on the device and one launch multiplies them all: the
host learns nothing of what the router chose, so a step can be captured.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from kernels.triton import runtime
from kernels.weights import ConcatWeight, DenseWeight, Int8Weight, LinearWeight

MOST_EXPERTS = 512
HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class StackedWeight:
    """Weights of `count` linear layers of one format and shape.

    `every` is such a weight whose tensors have one dimension more, the first: the expert.
    """

    every: LinearWeight
    count: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts, N, K)."""
        return (self.count, *self.every.shape)

    def expert(self, index: int) -> LinearWeight:
        """The weight of one expert: views, no copies."""
        taken: dict[str, Any] = {k: tensor[index] for k, tensor in _tensors(self.every).items()}
        return replace(self.every, **taken)


class _ExpertLinear(Protocol):
    def takes(self, weight: StackedWeight, dtype: torch.dtype) -> bool: ...

    def run(
        self,
        x: Tensor,
        gate_up: StackedWeight,
        down: StackedWeight,
        weights: Tensor,
        chosen: Tensor,
        gated: Callable[[Tensor], Tensor],
    ) -> Tensor: ...


def pack_experts(weights: Sequence[LinearWeight]) -> StackedWeight | None:
    """Weights of all experts, laid out for Triton's kernels, side by side.

    None where these do not run or take no such weight: weights that differ in format or shape, with
    biases, permuted columns or outliers.
    """
    first = weights[0]
    if isinstance(first, ConcatWeight) or not runtime.runs_on(first.data):
        return None
    if first.layout != ("plain" if isinstance(first, DenseWeight) else "triton"):
        return None
    if first.bias is not None or getattr(first, "permutation", None) is not None:
        return None
    if isinstance(first, Int8Weight) and first.outlier_threshold:
        return None
    if len(weights) > MOST_EXPERTS or first.shape[1] % 16:
        return None
    if any(_format(weight) != _format(first) for weight in weights):
        return None
    parts = [_tensors(weight) for weight in weights]
    stacked: dict[str, Any] = {name: _stack([part[name] for part in parts]) for name in parts[0]}
    return StackedWeight(replace(first, **stacked), len(weights))


def run_stacked(
    x: Tensor,
    gate_up: StackedWeight,
    down: StackedWeight,
    weights: Tensor,
    chosen: Tensor,
    gated: Callable[[Tensor], Tensor],
) -> Tensor | None:
    """Weighted sum of the chosen experts' outputs; x [T, K] -> [T, N of `down`] in x's dtype.

    weights float32 and chosen int64 [T, top_k] are ``ops.route``'s; `gated` takes the rows of
    `gate_up` [T * top_k, 2 I] to those of `down` [T * top_k, I]. A token's sum runs over its
    choices in order, in float32. None where no kernel takes x.
    """
    if not runtime.runs_on(x):
        return None
    kernels: _ExpertLinear = importlib.import_module("kernels.triton.expert_linear")
    if not (kernels.takes(gate_up, x.dtype) and kernels.takes(down, x.dtype)):
        return None
    return kernels.run(x, gate_up, down, weights, chosen, gated)


def _tensors(weight: LinearWeight) -> dict[str, Tensor]:
    named = {field.name: getattr(weight, field.name) for field in fields(weight)}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def _format(weight: LinearWeight) -> list[object]:
    """What must be alike in all experts: everything but the tensors' elements."""
    named = [(field.name, getattr(weight, field.name)) for field in fields(weight)]
    return [
        type(weight),
        *((k, (v.dtype, v.shape) if isinstance(v, Tensor) else v) for k, v in named),
    ]


def _stack(tensors: list[Tensor]) -> Tensor:
    if tensors[0].dtype != torch.float8_e4m3fn:
        return torch.stack(tensors)
    # PyTorch stacks no float8.
    return torch.stack([t.view(torch.uint8) for t in tensors]).view(torch.float8_e4m3fn)
