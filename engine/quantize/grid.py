"""The grid that a group of weights is rounded to: `w ~ (q - zero) * scale`, q in 0 .. 2**bits - 1.

The grid may span the group's extremes (round-to-nearest), or be searched: clipping the few largest
weights makes the steps of all others finer. What counts is the error of the layer's output; of one
group and row that is `d^T C d`, d the rounding errors and C the sum of x x^T over its inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Shares of the full range that a searched grid may keep; below half, clipping never wins.
SHRINKS = tuple(1.0 - 0.025 * step for step in range(21))
# Elements of a float32 temporary in the search: about 64 MB each.
_CHUNK = 1 << 24


def rows_at_once(columns: int) -> int:
    """Rows of a wide weight to work on at once, so that temporaries stay small."""
    return max(1, _CHUNK // columns)


def group_grid(
    groups: Tensor, bits: int, symmetric: bool, shrink: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Scales and zeros of groups float32 [..., S] by their extremes -> two float32 [...].

    Asymmetric: `scale = (max - min) / (2**bits - 1)`, `zero = round(-min / scale)`; the range is
    stretched to hold 0, so that zero is one of the integers and a weight of 0 stays 0. Symmetric:
    `scale = max|w| / ((2**bits - 1) / 2)`, zero the middle, `2**(bits - 1)`. `shrink` multiplies
    the range. A group of zeros has scale 1.
    """
    levels = 2**bits - 1
    if symmetric:
        scales = groups.abs().amax(dim=-1) * (shrink / (levels / 2))
    else:
        low = groups.amin(dim=-1).clamp_(max=0)
        high = groups.amax(dim=-1).clamp_(min=0)
        if shrink != 1.0:
            low, high = low * shrink, high * shrink
        scales = (high - low) / levels
    # Below the least normal float, dividing by the scale overflows: all of it is zero.
    scales = torch.where(scales > torch.finfo(torch.float32).tiny, scales, torch.ones_like(scales))
    if symmetric:
        return scales, torch.full_like(scales, 2 ** (bits - 1))
    return scales, torch.round(-low / scales).clamp_(0, levels)


def round_to_grid(values: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """The nearest integers 0 .. 2**bits - 1, as floats; scales and zeros broadcast."""
    return torch.round(values / scales + zeros).clamp_(0, 2**bits - 1)


def search_grid(
    weight: Tensor, gram: Tensor, group_size: int, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Of each row's and group's grids with a smaller range, the one of least output error.

    Source: Lin et al. 2023, AWQ, which searches a clipping range after its scales; the candidates
    are `SHRINKS` of the range. weight float32 [N, K]; gram float32 [K, K], sum of x^T x over the
    calibration rows. Returns scales and zeros, float32 [N, K / group_size].
    """
    columns = weight.shape[1]
    count = columns // group_size
    blocks = gram.reshape(count, group_size, count, group_size).diagonal(dim1=0, dim2=2)
    blocks = blocks.permute(2, 0, 1).float()  # [count, S, S]
    found = [
        _search(part.reshape(-1, count, group_size), blocks, bits, symmetric)
        for part in torch.split(weight.float(), rows_at_once(columns))
    ]
    return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])


def _search(groups: Tensor, blocks: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    best_scales, best_zeros = group_grid(groups, bits, symmetric)
    least = torch.full_like(best_scales, torch.inf)
    for shrink in SHRINKS:
        scales, zeros = group_grid(groups, bits, symmetric, shrink)
        q = round_to_grid(groups, scales[..., None], zeros[..., None], bits)
        error = ((q - zeros[..., None]) * scales[..., None] - groups).transpose(0, 1)
        loss = (torch.bmm(error, blocks) * error).sum(-1).transpose(0, 1)
        better = loss < least
        least = torch.where(better, loss, least)
        best_scales = torch.where(better, scales, best_scales)
        best_zeros = torch.where(better, zeros, best_zeros)
    return best_scales, best_zeros
