"""Rotary position embedding: frequencies, their scaling, and the table of cosines and sines."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.models.spec import RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """Radians per token of each pair of dimensions, float32 [head_dim / 2].

    `theta ** (-2i / head_dim)` (Su et al. 2021, RoFormer); `linear` is position interpolation
    (Chen et al. 2023); `llama3` is the piecewise scaling of Llama 3.1.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3(frequencies, rope)
    return frequencies


def _llama3(frequencies: Tensor, rope: RopeSpec) -> Tensor:
    wavelengths = 2 * math.pi / frequencies
    longest_kept = rope.original_max_position / rope.high_freq_factor
    shortest_scaled = rope.original_max_position / rope.low_freq_factor
    smooth = (rope.original_max_position / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    scaled = torch.where(wavelengths > shortest_scaled, frequencies / rope.factor, between)
    return torch.where(wavelengths < longest_kept, frequencies, scaled)


def cos_sin_table(rope: RopeSpec, head_dim: int, num_positions: int) -> Tensor:
    """Cosines then sines of every position's angles, float32 [num_positions, head_dim]."""
    positions = torch.arange(num_positions, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(rope, head_dim))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
