"""SmoothQuant: part of the activations' range is moved into the weights, so that both fit int8.

Source: Xiao et al. 2022, SmoothQuant, section 4, equation 4: `s_j = max|X_j|^a / max|W_j|^(1-a)`;
the input is divided by s, in the operation before (`engine.quantize.folding`), and the weights'
columns are multiplied. Both are then rounded to int8, weights by output channel and activations by
row as they come.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# The paper's value for OPT and BLOOM ("migration strength", section 5.1).
MIGRATION_STRENGTH = 0.5


def smoothing_scales(
    weights: Sequence[Tensor], largest_input: Tensor, strength: float = MIGRATION_STRENGTH
) -> Tensor:
    """The scales s float32 [K] for layers [N_i, K] that share an input of `largest_input` = max|x|.

    A channel that is dead in the input or in all weights keeps 1.
    """
    largest_weight = torch.stack([w.float().abs().amax(dim=0) for w in weights]).amax(dim=0)
    live = (largest_input > 0) & (largest_weight > 0)
    scales = largest_input**strength / largest_weight ** (1 - strength)
    return torch.where(live, scales.clamp(1e-5, 1e5), torch.ones_like(scales))
