"""Scales as a checkpoint stores them: in the model's dtype, which has fewer bits than float32.

Where integers or FP8 follow from a weight by rounding alone they are rounded again, to the grid
that the stored scales make, so that no reader is off by the scales' rounding.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from engine.quantize.forms import Fp8Form, Int8ChannelForm, IntGroupForm, LinearForm
from engine.quantize.fp8 import round_fp8
from engine.quantize.grid import round_to_grid
from engine.quantize.rtn import round_int8


def with_stored_scales(
    form: LinearForm, weight: Tensor, dtype: torch.dtype, *, requantize: bool
) -> LinearForm:
    """The same form with scales that `dtype` holds exactly.

    weight float [N, K] is what the form was made of. Without `requantize` integers in groups stay,
    as they must where each made up for the others (GPTQ).
    """
    if isinstance(form, Int8ChannelForm):
        scales = _rounded(form.scales, dtype)
        return dataclasses.replace(form, q=round_int8(weight, scales), scales=scales)
    if isinstance(form, Fp8Form) and form.block_shape is None:
        scales = _rounded(form.scales, dtype)
        return dataclasses.replace(form, data=round_fp8(weight, scales), scales=scales)
    if isinstance(form, IntGroupForm):
        scales = _rounded(form.scales, dtype)
        if not requantize or form.g_idx is not None:
            return dataclasses.replace(form, scales=scales)
        rows, columns = form.shape
        groups = weight.float().reshape(rows, -1, form.group_size)
        q = round_to_grid(groups, scales[..., None], form.zeros[..., None], form.bits)
        return dataclasses.replace(form, q=q.to(torch.uint8).reshape(rows, columns), scales=scales)
    return form


def _rounded(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 values that `dtype` holds; half precision has its least normal number for less."""
    least = torch.finfo(dtype).tiny
    return scales.clamp(min=least).to(dtype).float()
