"""Round-to-nearest: the scales follow from each channel's or group's own extremes, no data needed.

Sources: int8 per output channel, symmetric, is the weight half of W8A8 (Dettmers et al. 2022,
LLM.int8(), section 2.1); integers in groups are the baseline "RTN" of Frantar et al. 2022 (GPTQ)
and Lin et al. 2023 (AWQ).
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.quantize.forms import IntGroupForm
from engine.quantize.grid import group_grid, round_to_grid
from kernels.rounding import INT8_MAX


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per output channel: `w ~ q * scale`, `scale = max|w| / 127`.

    weight float [N, K] -> (q int8 [N, K] in -127..127, scales float32 [N]). A channel of zeros has
    scale 1.
    """
    wide = weight.float()
    scales = wide.abs().amax(dim=1) / INT8_MAX
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    return round_int8(wide, scales), scales


def round_int8(weight: Tensor, scales: Tensor) -> Tensor:
    """int8 [N, K] of a weight [N, K] under the scales [N] of its channels."""
    q = torch.round(weight.float() / scales[:, None]).clamp_(-INT8_MAX, INT8_MAX)
    return q.to(torch.int8)


def quantize_groups(
    weight: Tensor, group_size: int, bits: int, symmetric: bool = False
) -> IntGroupForm:
    """Integers of `bits` in groups along K, on the grids of `engine.quantize.grid.group_grid`.

    weight float [N, K], K a multiple of `group_size`.
    """
    rows, columns = weight.shape
    groups = weight.float().reshape(rows, columns // group_size, group_size)
    scales, zeros = group_grid(groups, bits, symmetric)
    q = round_to_grid(groups, scales[..., None], zeros[..., None], bits)
    return IntGroupForm(q.to(torch.uint8).reshape(rows, columns), scales, zeros, group_size, bits)


def quantize_int4(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric int4 in groups along K: `w ~ (q - zero) * scale`.

    weight float [N, K], K a multiple of `group_size` -> (q uint8 [N, K] in 0..15, scales float32
    [N, K / group_size], zeros float32 of the same shape).
    """
    form = quantize_groups(weight, group_size, bits=4)
    return form.q, form.scales, form.zeros
