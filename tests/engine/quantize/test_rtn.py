"""Rounding against its definition in float64."""

from __future__ import annotations

import pytest
import torch

from engine.quantize.rtn import quantize_int4, quantize_int8
from engine.quantize.weight_size import int4_group_size


def weights(seed: int, rows: int = 24, columns: int = 128) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(rows, 1, generator=generator) * 3 + 0.01
    return torch.randn(rows, columns, generator=generator) * scale


def test_int8_is_within_half_a_step() -> None:
    w = weights(1)
    w[3] = 0
    q, scales = quantize_int8(w)
    assert q.dtype == torch.int8
    assert int(q.min()) >= -127
    error = (q.double() * scales.double()[:, None] - w.double()).abs()
    assert bool((error <= scales.double()[:, None] * 0.5001).all())
    assert torch.equal(q[3], torch.zeros_like(q[3]))
    full = q.abs().amax(1)
    assert bool((full[[0, 1, 2, 4]] == 127).all())  # the whole range is used


@pytest.mark.parametrize("group_size", [16, 32, 64, 128])
@pytest.mark.parametrize("offset", [0.0, 5.0, -5.0])
def test_int4_is_within_half_a_step(group_size: int, offset: float) -> None:
    w = weights(2) + offset
    w[5] = 0
    q, scales, zeros = quantize_int4(w, group_size)
    assert q.dtype == torch.uint8
    assert int(q.max()) <= 15
    assert scales.shape == zeros.shape == (24, 128 // group_size)
    s = scales.double().repeat_interleave(group_size, 1)
    z = zeros.double().repeat_interleave(group_size, 1)
    error = ((q.double() - z) * s - w.double()).abs()
    # Half a step of rounding and at the ends half a step of the rounded zero.
    assert bool((error <= s * 1.001).all())
    assert float((error / s).mean()) < 0.3
    assert bool(((q[5].double() - z[5]) * s[5] == 0).all())


def test_int4_keeps_zero_exactly() -> None:
    w = weights(3) + 1.0
    w[:, ::7] = 0
    q, scales, zeros = quantize_int4(w, 64)
    back = (q.float() - zeros.repeat_interleave(64, 1)) * scales.repeat_interleave(64, 1)
    assert bool((back[:, ::7] == 0).all())


def test_smaller_groups_are_closer() -> None:
    w = weights(4)
    errors = []
    for group_size in (16, 32, 64, 128):
        q, s, z = quantize_int4(w, group_size)
        back = (q - z.repeat_interleave(group_size, 1)) * s.repeat_interleave(group_size, 1)
        errors.append(float((back - w).norm()))
    assert errors == sorted(errors)


@pytest.mark.parametrize(
    ("columns", "expected"), [(4096, 64), (96, 32), (48, 16), (576, 64), (40, None), (7, None)]
)
def test_group_size(columns: int, expected: int | None) -> None:
    assert int4_group_size(columns) == expected
