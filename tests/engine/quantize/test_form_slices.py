"""A part of a form stands for a part of its floats, exactly."""

from __future__ import annotations

import pytest
import torch

from engine.quantize import forms
from engine.quantize.form_slices import take_columns, take_runs
from engine.quantize.forms import DenseForm, Fp8Form, IntGroupForm, LinearForm, dequantize
from engine.quantize.methods import quantize_weight
from engine.quantize.rtn import quantize_groups
from kernels.ops import linear

ROWS, COLUMNS = 40, 192
GENERATOR = torch.Generator().manual_seed(11)
WEIGHT = torch.randn(ROWS, COLUMNS, generator=GENERATOR)


def blocks(rows: int, columns: int) -> Fp8Form:
    """e4m3 in blocks, of which those at the edges are cut off."""
    shape = (-(-ROWS // rows), -(-COLUMNS // columns))
    scales = torch.rand(shape, generator=GENERATOR) + 0.1
    return Fp8Form(WEIGHT.to(torch.float8_e4m3fn), scales, (rows, columns))


def scattered() -> IntGroupForm:
    form = quantize_groups(WEIGHT, 32, 4)
    order = torch.randperm(COLUMNS, generator=GENERATOR)
    g_idx = torch.arange(COLUMNS)[order] // 32
    return IntGroupForm(form.q, form.scales, form.zeros, 32, 4, g_idx)


FORMS: dict[str, LinearForm] = {
    "dense": DenseForm(WEIGHT),
    **{name: quantize_weight(WEIGHT, name) for name in ("int8", "llm_int8", "fp8", "int4", "nf4")},
    "int3": quantize_groups(WEIGHT, 24, 3),
    "blocks": blocks(16, 128),
    "scattered": scattered(),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("runs", [[(0, 10)], [(16, 32)], [(30, 40), (5, 8), (16, 24)]])
def test_rows(name: str, runs: list[tuple[int, int]]) -> None:
    form = FORMS[name]
    taken = take_runs(form, runs)
    expected = torch.cat([dequantize(form)[start:stop] for start, stop in runs])
    assert torch.equal(dequantize(taken), expected)
    assert type(taken) is type(form)
    served(taken)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(("start", "stop"), [(0, 96), (96, 192), (48, 72), (64, 192), (0, 192)])
def test_columns(name: str, start: int, stop: int) -> None:
    form = FORMS[name]
    taken = take_columns(form, start, stop)
    assert torch.equal(dequantize(taken), dequantize(form)[:, start:stop])
    if name != "scattered":
        assert type(taken) is type(form)
    served(taken)


def test_whole_scattered_groups_stay_integers() -> None:
    form = quantize_groups(WEIGHT, 32, 4)
    g_idx = torch.tensor([2, 5, 0, 1, 4, 3]).repeat_interleave(32)
    part = torch.randperm(96, generator=GENERATOR)
    g_idx = torch.cat([g_idx[:96][part], g_idx[96:]])
    whole = IntGroupForm(form.q, form.scales, form.zeros, 32, 4, g_idx)
    for start in (0, 96):
        taken = take_columns(whole, start, start + 96)
        assert isinstance(taken, IntGroupForm)
        assert torch.equal(dequantize(taken), dequantize(whole)[:, start : start + 96])
        served(taken)


def test_groups_are_not_cut_to_crumbs() -> None:
    assert isinstance(take_columns(FORMS["int4"], 0, 100), DenseForm)


def served(form: LinearForm) -> None:
    """The kernels take it as it is."""
    x = torch.randn(3, form.shape[1], generator=GENERATOR)
    expected = x.double() @ dequantize(form).double().T
    actual = linear(x, forms.pack([form], None, torch.float32))
    error = (actual - expected).square().mean().sqrt() / expected.std()
    assert error < 0.06, float(error)
