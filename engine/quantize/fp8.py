"""FP8 e4m3: floats of 4 exponent and 3 mantissa bits under one scale a tensor or a channel.

Source: Micikevicius et al. 2022, FP8 Formats for Deep Learning, sections 2 and 3: a tensor is
scaled so that its largest magnitude meets the format's largest, 448, and rounded to nearest even.
Activations are rounded like this as they come, row by row ("dynamic"), by the matmul.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from engine.quantize.forms import Fp8Form
from kernels.rounding import FP8_MAX


def quantize_fp8(weight: Tensor, scale_of: Literal["channel", "tensor"] = "channel") -> Fp8Form:
    """`w ~ data * scale`, `scale = max|w| / 448` of the row or of the whole tensor.

    weight float [N, K] -> scales float32 [N] or [1]. What is all zeros has scale 1.
    """
    wide = weight.float()
    largest = wide.abs().amax(dim=1) if scale_of == "channel" else wide.abs().amax().reshape(1)
    scales = largest / FP8_MAX
    # So small a maximum that its 448th part underflows rounds to zeros under any scale.
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    return Fp8Form(round_fp8(wide, scales), scales, activations="dynamic")


def round_fp8(weight: Tensor, scales: Tensor) -> Tensor:
    """e4m3 [N, K] of a weight [N, K] under one scale [1] or those of its channels [N]."""
    # Clamped first: the cast makes NaN of what is above 448, where division may have rounded up.
    scaled = (weight.float() / scales.reshape(-1, 1)).clamp_(-FP8_MAX, FP8_MAX)
    return scaled.to(torch.float8_e4m3fn)
