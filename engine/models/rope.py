"""Rotary position embedding: frequencies, their scaling, and the table of cosines and sines."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.models.spec import DecoderSpec, RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int, num_positions: int = 0) -> Tensor:
    """Radians per token of each pair of turning elements, float32 [rotary_dim / 2].

    `theta ** (-2i / rotary_dim)` (Su et al. 2021, RoFormer). `linear` is position interpolation
    (Chen et al. 2023), `llama3` the piecewise scaling of Llama 3.1, `yarn` that of Peng et al.
    2023, `longrope` that of Ding et al. 2024; for it `num_positions` is the longest sequence that
    is served, in tokens.
    """
    dim = rope.rotary_dim(head_dim)
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    if rope.kind == "longrope":
        is_long = num_positions > rope.original_max_position
        factors = torch.tensor(rope.long_factor if is_long else rope.short_factor)
        return 1.0 / (factors * rope.theta**exponents)
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3(frequencies, rope)
    if rope.kind == "yarn":
        return _yarn(frequencies, rope, dim)
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


def _yarn(frequencies: Tensor, rope: RopeSpec, dim: int) -> Tensor:
    def pair_that_turns(times: float) -> float:
        """Index of the pair that turns so often within the original length."""
        length = rope.original_max_position / (times * 2 * math.pi)
        return dim * math.log(length) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    # A ramp of no width is a step; its width only must not be 0.
    width = (high - low) or 0.001
    pairs = torch.arange(dim // 2, dtype=torch.float32)
    interpolated = ((pairs - low) / width).clamp(0, 1)
    return frequencies / rope.factor * interpolated + frequencies * (1 - interpolated)


def cos_sin_table(rope: RopeSpec, head_dim: int, num_positions: int) -> Tensor:
    """Cosines then sines of every position's angles, float32 [num_positions, rotary_dim]."""
    positions = torch.arange(num_positions, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(rope, head_dim, num_positions))
    table = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return table if rope.attention_factor == 1.0 else table * rope.attention_factor


def layer_tables(spec: DecoderSpec, num_positions: int, device: torch.device) -> list[Tensor]:
    """The table of each layer for positions below `num_positions`; layers share them."""
    common = cos_sin_table(spec.rope, spec.head_dim, num_positions).to(device)
    local = common
    if spec.local_rope is not None and any(spec.layer_windows):
        local = cos_sin_table(spec.local_rope, spec.head_dim, num_positions).to(device)
    return [local if window else common for window in spec.layer_windows]
