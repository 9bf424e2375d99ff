"""Weights of a mixture's experts side by side, and the matmuls that take each row to its own.

Where Triton runs, rows are sorted by expert on the device and one launch multiplies them all: the
host learns nothing of what the router chose, so a step can be captured.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from kernels.triton import runtime
from kernels.weights import (
    ConcatWeight,
    DenseWeight,
    Fp8Weight,
    Int4Weight,
    Int8GroupWeight,
    Int8Weight,
    LinearWeight,
)

MOST_EXPERTS = 512
FLOATS = (torch.bfloat16, torch.float16, torch.float32)

Stackable = DenseWeight | Int8Weight | Fp8Weight | Int4Weight | Int8GroupWeight


@dataclass(frozen=True, slots=True)
class StackedWeight:
    """Weights of E linear layers of one format and shape (E, N, K).

    `data` is [E, ...] of what `first` has in layout "plain". `scales` is float32 [E, ...] alike, or
    [E, K / group_size, N] for formats in groups, as `zeros` is. `input_scales` is float32 [E] where
    activations are static. `first` is the weight of expert 0.
    """

    first: Stackable
    data: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    input_scales: Tensor | None
    shape: tuple[int, int, int]

    def expert(self, index: int) -> LinearWeight:
        """The weight of one expert in layout "plain": views, no copies."""
        first, data = self.first, self.data[index]
        if isinstance(first, DenseWeight):
            return replace(first, data=data)
        assert self.scales is not None
        scales = self.scales[index]
        if isinstance(first, (Int4Weight, Int8GroupWeight)):
            assert self.zeros is not None
            return replace(first, data=data, scales=scales.t(), zeros=self.zeros[index].t())
        if isinstance(first, Fp8Weight):
            given = self.input_scales
            scale = None if given is None else given[index : index + 1]
            return replace(first, data=data, scales=scales, input_scale=scale)
        return replace(first, data=data, scales=scales)


class _Grouped(Protocol):
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
    """Weights of all experts, made inside ``runtime.unpacked``, side by side.

    None where Triton does not run on their device, and for formats that its kernels do not take:
    weights that differ in format or shape, with biases, permuted columns, outliers or tables, K
    that is no multiple of 32, groups that are no power of two from 32 on.
    """
    first = weights[0]
    if not isinstance(first, Stackable) or not runtime.runs_on(first.data):
        return None
    if any(_format(weight) != _format(first) for weight in weights) or not _is_taken(first):
        return None
    if len(weights) > MOST_EXPERTS:
        return None
    parts = [weight for weight in weights if isinstance(weight, type(first))]
    data = torch.stack([_bytes(part.data) for part in parts]).view(first.data.dtype)
    shape = (len(parts), *first.shape)
    scales, zeros, input_scales = None, None, None
    if not isinstance(first, DenseWeight):
        scales = torch.stack([part.scales for part in parts if not isinstance(part, DenseWeight)])
    if isinstance(first, (Int4Weight, Int8GroupWeight)):
        assert scales is not None
        scales = scales.transpose(1, 2).contiguous()
        grouped = [p.zeros.t() for p in parts if isinstance(p, (Int4Weight, Int8GroupWeight))]
        zeros = torch.stack(grouped).contiguous()
    if isinstance(first, Fp8Weight) and first.activations == "static":
        given = [p.input_scale for p in parts if isinstance(p, Fp8Weight)]
        input_scales = torch.cat([scale for scale in given if scale is not None])
    stacked = StackedWeight(first, data, scales, zeros, input_scales, shape)
    # What was the first expert's own would otherwise be held twice.
    kept = stacked.expert(0)
    assert isinstance(kept, Stackable)
    return replace(stacked, first=kept)


def settled(weight: LinearWeight) -> LinearWeight:
    """A weight that was left in layout "plain" (``runtime.unpacked``) as its kernels want it."""
    if isinstance(weight, ConcatWeight):
        return replace(weight, parts=tuple(settled(part) for part in weight.parts))
    if weight.layout != "plain" or not runtime.runs_on(weight.data):
        return weight
    packed: LinearWeight | None = importlib.import_module("kernels.triton.linears").pack(weight)
    return weight if packed is None else packed


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
    if not runtime.runs_on(x) or x.dtype not in FLOATS:
        return None
    if isinstance(gate_up.first, DenseWeight) and x.dtype != gate_up.data.dtype:
        return None
    grouped: _Grouped = importlib.import_module("kernels.triton.expert_linear")
    return grouped.run(x, gate_up, down, weights, chosen, gated)


def _bytes(x: Tensor) -> Tensor:
    # PyTorch stacks no float8.
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def _format(weight: LinearWeight) -> tuple[object, ...]:
    """What must be alike in all experts."""
    found: tuple[object, ...] = (type(weight), weight.shape, weight.layout, weight.dtype)
    if isinstance(weight, Fp8Weight):
        return (*found, weight.block_shape, weight.activations)
    if isinstance(weight, (Int4Weight, Int8GroupWeight)):
        return (*found, weight.group_size)
    return found


def _is_taken(weight: Stackable) -> bool:
    if weight.layout != "plain" or weight.bias is not None or weight.shape[1] % 32:
        return False
    if isinstance(weight, DenseWeight):
        return weight.dtype in FLOATS
    if isinstance(weight, Int8Weight):
        return not weight.outlier_threshold
    if isinstance(weight, Fp8Weight):
        return weight.block_shape is None or _is_whole(weight.block_shape[1])
    return weight.permutation is None and _is_whole(weight.group_size)


def _is_whole(columns: int) -> bool:
    return columns >= 32 and columns & (columns - 1) == 0
