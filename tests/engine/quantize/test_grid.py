"""Grids by their definition, and the search against trying every candidate by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from engine.quantize.forms import dequantize
from engine.quantize.grid import SHRINKS, group_grid, round_to_grid, search_grid
from engine.quantize.rtn import quantize_groups

FLOATS = st.floats(-(2.0**99), 2.0**99, width=32, allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(
    values=arrays.arrays(np.float32, (2, 32), elements=FLOATS),
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
)
def test_within_one_step_whatever_the_weights(
    values: np.ndarray, bits: int, symmetric: bool
) -> None:
    weight = torch.from_numpy(values)
    form = quantize_groups(weight, 16, bits, symmetric)
    assert form.q.dtype == torch.uint8
    assert int(form.q.max()) <= 2**bits - 1
    assert bool(torch.isfinite(form.scales).all())
    assert bool((form.scales > 0).all())
    assert bool(((form.zeros >= 0) & (form.zeros <= 2**bits - 1)).all())
    assert bool((form.zeros == form.zeros.round()).all())
    if symmetric:
        assert bool((form.zeros == 2 ** (bits - 1)).all())
    step = form.scales.double().repeat_interleave(16, 1)
    zeros = form.zeros.double().repeat_interleave(16, 1)
    restored = (form.q.double() - zeros) * step
    # What is too small for a scale of normal floats becomes zero.
    tiny = 4 * 2**bits * torch.finfo(torch.float32).tiny
    error = (restored - weight.double()).abs()
    assert bool((error <= step * 1.001).all() or (weight.abs() <= tiny).all())
    assert bool((restored[weight == 0] == 0).all())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [0.0, 3.0, -0.25, 1e-38, 1e38])
def test_constant_groups(symmetric: bool, value: float) -> None:
    weight = torch.full((3, 32), value)
    restored = dequantize(quantize_groups(weight, 16, 4, symmetric))
    bound = abs(value) / 15 * 1.01 if abs(value) > 1e-30 else 1e-37
    assert bool(((restored - weight).abs() <= bound).all())


@pytest.mark.parametrize("symmetric", [False, True])
def test_search_takes_the_candidate_of_least_output_error(symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 64, generator=generator)
    weight[:, ::16] *= 6
    x = torch.randn(200, 64, generator=generator) * torch.rand(64, generator=generator)
    scales, zeros = search_grid(weight, x.T @ x, 32, 4, symmetric)
    for row in range(6):
        for group in range(2):
            columns = slice(32 * group, 32 * group + 32)
            w, inputs = weight[row, columns], x[:, columns].double()
            errors = []
            for shrink in SHRINKS:
                s, z = group_grid(w[None], 4, symmetric, shrink)
                q = round_to_grid(w[None], s[:, None], z[:, None], 4)
                change = ((q - z) * s - w).double()[0]
                errors.append(float((inputs @ change).square().sum()))
            s, z = scales[row, group], zeros[row, group]
            q = round_to_grid(w, s, z, 4)
            found = float((inputs @ ((q - z) * s - w).double()).square().sum())
            assert found == pytest.approx(min(errors), rel=1e-3)
    assert not torch.equal(scales, group_grid(weight.reshape(6, 2, 32), 4, symmetric)[0])


def test_search_without_inputs_keeps_the_whole_range() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(4))
    scales, zeros = search_grid(weight, torch.zeros(64, 64), 32, 4, False)
    plain = quantize_groups(weight, 32, 4)
    assert torch.equal(scales, plain.scales)
    assert torch.equal(zeros, plain.zeros)
