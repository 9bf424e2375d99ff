"""Symmetric rounding to int8 and e4m3, which activations, caches and weights share."""

import torch
from torch import Tensor

INT8_MAX = 127
FP8_MAX = 448.0  # largest finite e4m3
SMALLEST = 2.0**-119  # of a row's maximum; below it the inverse of the scale is infinite


def quantize_last(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round by the maximum over the last dimension: x [..., K] -> (data, float32 scales [..., 1]).

    `scale = max|x| / 127` for int8 and `/ 448` for e4m3, rounding to nearest even. Rows of zeros
    and of magnitudes below SMALLEST have scale 0.
    """
    wide = x.float()
    largest = wide.abs().amax(-1, keepdim=True)
    largest = torch.where(largest < SMALLEST, 0.0, largest)
    most = float(INT8_MAX) if dtype == torch.int8 else FP8_MAX
    inverse = torch.where(largest > 0, torch.full_like(largest, most) / largest, 0.0)
    scaled = wide * inverse
    if dtype == torch.int8:
        scaled = torch.round(scaled)
    return scaled.to(dtype), largest / most


def spread_blocks(scales: Tensor, block_shape: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Scales by blocks of (rows, columns) -> [N, K] = `shape`, each over its block."""
    (rows, columns), (n, k) = block_shape, shape
    return scales.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]
