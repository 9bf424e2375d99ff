"""Native FP8 layers against what transformers makes of them, and the formula in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

from engine.errors import ModelError
from engine.quantize.forms import Fp8Form
from tests.engine.checkpoints.quantized_files import (
    PREFIX,
    edit,
    edit_quantization,
    layer,
    read_form,
    read_weight,
    source_of,
    write,
)

SHAPE = (96, 64)
E4M3 = torch.float8_e4m3fn


def make(folder: Path, scales: dict[str, Tensor], **fields: Any) -> Tensor:
    """Write one layer of random FP8; its data."""
    data = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4)).mul(50).to(E4M3)
    write(folder, layer({"weight": data, **scales}), {"quant_method": "fp8", **fields})
    return data


@pytest.mark.parametrize("block", [(32, 32), (64, 48)])
def test_blocks(tmp_path: Path, block: tuple[int, int]) -> None:
    grid = (-(-SHAPE[0] // block[0]), -(-SHAPE[1] // block[1]))
    scales = torch.rand(grid) + 0.1
    data = make(tmp_path, {"weight_scale_inv": scales}, weight_block_size=list(block))
    form = read_form(tmp_path, SHAPE)
    assert isinstance(form, Fp8Form)
    assert (form.block_shape, form.activations) == (block, "dynamic")
    spread = scales.double().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    wanted = data.double() * spread[: SHAPE[0], : SHAPE[1]]
    assert torch.allclose(read_weight(tmp_path, SHAPE).double(), wanted, rtol=1e-7)
    assert source_of(tmp_path).quantization == (
        f"fp8 e4m3 blocks {block[0]}x{block[1]}, dynamic activations"
    )
    if SHAPE[1] % block[1] == 0:  # transformers splits whole blocks alone
        theirs = _dequantize_fp8_weight(data, scales, list(block), torch.float32)
        assert torch.equal(read_weight(tmp_path, SHAPE), theirs)


def test_a_block_larger_than_the_weight_takes_no_memory(tmp_path: Path) -> None:
    data = make(tmp_path, {"weight_scale_inv": torch.full((1, 1), 0.5)},
                weight_block_size=[10**12, 10**12])  # fmt: skip
    assert torch.equal(read_weight(tmp_path, SHAPE), data.float() / 2)


def test_scales_that_are_powers_of_two(tmp_path: Path) -> None:
    scales = torch.tensor([[0.5, 2.0], [4.0, 0.25], [1.0, 8.0]])
    stored = scales.to(torch.float8_e8m0fnu)
    make(tmp_path, {"weight_scale_inv": stored}, weight_block_size=[32, 32])
    form = read_form(tmp_path, SHAPE)
    assert isinstance(form, Fp8Form)
    assert torch.equal(form.scales, scales)


@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale"])
@pytest.mark.parametrize("shape", [(), (1,), (SHAPE[0],), (SHAPE[0], 1)])
def test_one_scale_or_one_a_row(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    scales = torch.rand(shape) + 0.1
    data = make(tmp_path, {name: scales})
    wanted = data.double() * scales.double().reshape(-1, 1)
    assert torch.allclose(read_weight(tmp_path, SHAPE).double(), wanted, rtol=1e-7)


@pytest.mark.parametrize("name", ["activation_scale", "input_scale"])
def test_static_activations(tmp_path: Path, name: str) -> None:
    scales = {"weight_scale_inv": torch.tensor(0.5), name: torch.tensor(0.125)}
    make(tmp_path, scales, activation_scheme="static", weight_block_size=None)
    form = read_form(tmp_path, SHAPE)
    assert isinstance(form, Fp8Form)
    assert form.input_scale is not None
    assert (form.activations, form.input_scale.tolist()) == ("static", [0.125])
    edit(tmp_path, lambda tensors: tensors.pop(f"{PREFIX}.{name}"))
    with pytest.raises(ModelError, match=r"has no tensor '.*activation_scale'"):
        read_form(tmp_path, SHAPE)


def test_modules_in_floats(tmp_path: Path) -> None:
    make(tmp_path, {"weight_scale": torch.ones(1)}, modules_to_not_convert=["lm_head"])
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.ones(4, 8)}))
    assert torch.equal(read_weight(tmp_path, (4, 8), "lm_head"), torch.ones(4, 8))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation_scheme": "sometimes"}, "activation_scheme 'sometimes' is not supported"),
        ({"fmt": "e5m2"}, "fmt 'e5m2' is not supported"),
        ({"weight_block_size": [128]}, r"must be two positive integers, got \[128\]"),
        ({"weight_block_size": [0, 1]}, "must be two positive integers"),
        ({"weight_block_size": [32, 32], "activation_scheme": "static"}, "goes? with|go with"),
        ({"weight_block_size": [32, 32]}, r"weight_scale' has shape \[1\]; .* \[3, 2\]"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    make(tmp_path, {"weight_scale": torch.ones(1)})
    edit_quantization(tmp_path, **fields)
    with pytest.raises(ModelError, match=message):
        read_form(tmp_path, SHAPE)


def test_tensors_that_are_refused(tmp_path: Path) -> None:
    make(tmp_path, {"weight_scale": torch.ones(1)})
    other = "model.layers.1.mlp.up_proj"
    data = torch.zeros(SHAPE, dtype=E4M3)
    edit(tmp_path, lambda tensors: tensors.update({f"{other}.weight": data}))
    with pytest.raises(ModelError, match=rf"has no tensor '{other}\.weight_scale_inv'"):
        read_form(tmp_path, SHAPE, other)
    with pytest.raises(ModelError, match=r"weight' has shape \[96, 64\]; .* \[96, 65\]"):
        read_form(tmp_path, (96, 65))
