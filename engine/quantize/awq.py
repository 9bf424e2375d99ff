"""AWQ: channels that see large activations are scaled up before rounding, and down again for free.

Source: Lin et al. 2023, AWQ: Activation-aware Weight Quantization, section 3.2. For the linear
layers that share an input, `Q(W diag(s)) (diag(s)^-1 x)` replaces `Q(W) x`, with `s = mean|x|^a`
and a from a grid, the one of least output error (equations 4 and 5); `diag(s)^-1` goes into the
operation before (`engine.quantize.folding`). Then each group's range is clipped where that lowers
the error (section 3.2 end and the authors' code; `engine.quantize.grid.search_grid`).

Errors are measured on second moments, `|D X|^2 = tr(D (X X^T) D^T)`, so that no activations are
kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.quantize.forms import IntGroupForm
from engine.quantize.grid import group_grid, round_to_grid, rows_at_once, search_grid

# Rows of the weights, evenly spread, that exponents are tried on: the error of a candidate is a sum
# over rows, and a few thousand tell it well enough at a fraction of a wide layer's time.
_ROWS_TRIED = 2048


@dataclass(frozen=True, slots=True)
class AwqOptions:
    """How to round, over how many exponents to search, and whether ranges are clipped."""

    bits: int = 4
    group_size: int = 64
    symmetric: bool = False
    steps: int = 20
    clip: bool = True


def search_scales(
    weights: Sequence[Tensor], gram: Tensor, mean_abs: Tensor, options: AwqOptions
) -> Tensor:
    """The scales s [K] for layers float [N_i, K] that share an input; all ones if none is better.

    gram float32 [K, K] is the sum of x^T x, mean_abs [K] what s is a power of. The weights are to
    be multiplied by s and the input divided.
    """
    rows = sum(len(weight) for weight in weights)
    stacked = torch.cat([weight[:: -(-rows // _ROWS_TRIED)].float() for weight in weights])
    best = torch.ones_like(mean_abs)
    least = _output_error(stacked, best, gram, options)
    for step in range(1, options.steps + 1):
        scales = scales_of(mean_abs, step / options.steps)
        error = _output_error(stacked, scales, gram, options)
        if error < least:
            best, least = scales, error
    return best


def scales_of(mean_abs: Tensor, exponent: float) -> Tensor:
    """`mean|x|^a`, around 1: divided by the root of its extremes' product. Dead channels keep 1."""
    live = mean_abs > 0
    if not bool(live.any()):
        return torch.ones_like(mean_abs)
    # Channels a thousand times below the mean are as good as dead: no scale should follow them.
    floor = 1e-3 * mean_abs[live].mean()
    scales = mean_abs.clamp(min=floor) ** exponent
    scales = scales / (scales[live].amax() * scales[live].amin()).sqrt()
    return torch.where(live, scales, torch.ones_like(scales))


def quantize_clipped(weight: Tensor, gram: Tensor, options: AwqOptions) -> IntGroupForm:
    """Round weight float [N, K], already scaled, for inputs already divided (`gram` theirs)."""
    rows, columns = weight.shape
    size = options.group_size
    groups = weight.float().reshape(rows, columns // size, size)
    if options.clip:
        scales, zeros = search_grid(weight.float(), gram, size, options.bits, options.symmetric)
    else:
        scales, zeros = group_grid(groups, options.bits, options.symmetric)
    q = round_to_grid(groups, scales[..., None], zeros[..., None], options.bits)
    return IntGroupForm(q.to(torch.uint8).reshape(rows, columns), scales, zeros, size, options.bits)


def _output_error(weight: Tensor, scales: Tensor, gram: Tensor, options: AwqOptions) -> float:
    total = 0.0
    for part in torch.split(weight, rows_at_once(weight.shape[1])):
        scaled = part * scales
        groups = scaled.reshape(len(part), -1, options.group_size)
        grid, zeros = group_grid(groups, options.bits, options.symmetric)
        q = round_to_grid(groups, grid[..., None], zeros[..., None], options.bits)
        rounded = ((q - zeros[..., None]) * grid[..., None]).reshape(scaled.shape)
        error = rounded / scales - part
        total += float(((error @ gram) * error).sum(dtype=torch.float64))
    return total
