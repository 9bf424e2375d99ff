"""AWQ layers against a packer and a dequantizer written from the specification."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import ModelError
from tests.engine.checkpoints.gptq_packer import awq_layer, random_integers
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

SHAPE = (32, 96)


def make(folder: Path, group_size: int = 32, **fields: Any) -> torch.Tensor:
    size = SHAPE[1] if group_size == -1 else group_size
    q, zeros, scales = random_integers(*SHAPE, 4, size, 3, False)
    stored, weight = awq_layer(q, zeros, scales, size)
    config = {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm"}
    write(folder, layer(stored), {**config, **fields})
    return weight


@pytest.mark.parametrize("group_size", [32, 16, -1, 96])
def test_weight_is_exact(tmp_path: Path, group_size: int) -> None:
    weight = make(tmp_path, group_size)
    assert torch.equal(read_weight(tmp_path, SHAPE).double(), weight)


def test_without_zeros_the_middle_is_zero(tmp_path: Path) -> None:
    make(tmp_path, zero_point=False)
    weight = read_weight(tmp_path, SHAPE)
    edit(tmp_path, lambda tensors: tensors.pop(f"{PREFIX}.qzeros"))
    symmetric = read_weight(tmp_path, SHAPE)
    q, zeros, scales = random_integers(*SHAPE, 4, 32, 3, False)
    wanted = (q - 8).double() * scales.double().repeat_interleave(32, 1)
    assert torch.equal(symmetric.double(), wanted)
    assert not torch.equal(weight, symmetric)
    assert zeros.shape == scales.shape


def test_older_config_and_modules_in_floats(tmp_path: Path) -> None:
    weight = make(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"model.layers.0.gate.weight": torch.ones(4, 8)}))
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    older = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (tmp_path / "quant_config.json").write_text(json.dumps(older))
    assert torch.equal(read_weight(tmp_path, SHAPE).double(), weight)
    assert torch.equal(read_weight(tmp_path, (4, 8), "model.layers.0.gate"), torch.ones(4, 8))
    assert source_of(tmp_path).quantization == "awq int4 group 32"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": "gemv"}, "AWQ version 'gemv' is not supported; supported is 'gemm'"),
        ({"bits": 3}, "bits of AWQ must be 4, got 3"),
        ({"group_size": None}, "group_size must be a positive number"),
        ({"group_size": 36}, "whole groups of 36"),
        ({"zero_point": 1}, "zero_point must be true or false"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    make(tmp_path)
    edit_quantization(tmp_path, **fields)
    with pytest.raises(ModelError, match=message):
        read_form(tmp_path, SHAPE)


@pytest.mark.parametrize("part", ["qzeros", "scales"])
def test_missing_parts(tmp_path: Path, part: str) -> None:
    make(tmp_path)
    edit(tmp_path, lambda tensors: tensors.pop(f"{PREFIX}.{part}"))
    with pytest.raises(ModelError, match=rf"has no tensor '{PREFIX}\.{part}'"):
        read_form(tmp_path, SHAPE)
