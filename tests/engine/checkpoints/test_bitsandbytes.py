"""Layers of bitsandbytes against the library's own quantization and dequantization."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from engine.errors import ModelError
from engine.quantize.forms import DenseForm, Int8ChannelForm, TableForm
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

SHAPE = (64, 320)


def four_bits(
    folder: Path, kind: str = "nf4", nested: bool = False, shape: tuple[int, int] = SHAPE
) -> Tensor:
    """Write one layer; what the library dequantizes it to."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    packed, state = bnb.quantize_4bit(
        weight, blocksize=64, quant_type=kind, compress_statistics=nested
    )
    stored = {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": kind,
    }
    write(folder, layer({"weight": packed, **stored}), config)
    # Blocks run through the flattened weight; the library's CPU kernel forgets that where rows do
    # not hold whole blocks, so it is given one long row.
    state.shape = torch.Size([1, weight.numel()])
    dequantized: Tensor = bnb.dequantize_4bit(packed, state)
    return dequantized.view(shape)


def eight_bits(folder: Path, **fields: Any) -> tuple[Tensor, Tensor]:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)).half()
    scales = weight.abs().amax(1).float()
    q = (weight.float() / scales[:, None] * 127).round().to(torch.int8)
    stored = {"weight": q, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    write(folder, layer(stored), {"quant_method": "bitsandbytes", "load_in_8bit": True, **fields})
    return q, scales


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits(tmp_path: Path, kind: str, nested: bool) -> None:
    wanted = four_bits(tmp_path, kind, nested)
    form = read_form(tmp_path, SHAPE)
    assert isinstance(form, TableForm)
    assert form.group_size == 64
    assert torch.equal(read_weight(tmp_path, SHAPE), wanted)
    assert source_of(tmp_path).quantization == f"bitsandbytes {kind}"
    assert source_of(tmp_path).notes == []


@pytest.mark.parametrize("shape", [(6, 48), (5, 33)])
def test_blocks_that_cross_rows(tmp_path: Path, shape: tuple[int, int]) -> None:
    wanted = four_bits(tmp_path, shape=shape)
    source = source_of(tmp_path)
    assert isinstance(source.linear(PREFIX, shape), DenseForm)
    assert "NF4 in blocks that cross rows" in source.notes[0]
    assert torch.equal(read_weight(tmp_path, shape), wanted)


@pytest.mark.parametrize("threshold", [6.0, 0, 4])
def test_eight_bits(tmp_path: Path, threshold: float) -> None:
    q, scales = eight_bits(tmp_path, llm_int8_threshold=threshold)
    form = read_form(tmp_path, SHAPE)
    assert isinstance(form, Int8ChannelForm)
    assert form.outlier_threshold == threshold
    assert torch.equal(form.q, q)
    # The library multiplies by a rounded 1 / 127.
    wanted = bnb.int8_vectorwise_dequant(q, scales)
    assert torch.allclose(read_weight(tmp_path, SHAPE), wanted, rtol=1e-6, atol=0)


def test_modules_in_floats(tmp_path: Path) -> None:
    four_bits(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.ones(4, 8)}))
    assert torch.equal(read_weight(tmp_path, (4, 8), "lm_head"), torch.ones(4, 8))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"load_in_4bit": False}, "either load_in_4bit or load_in_8bit must be true"),
        ({"load_in_8bit": True}, "either load_in_4bit or load_in_8bit must be true"),
        ({"bnb_4bit_quant_type": "int4"}, "'int4' is not supported; supported are nf4, fp4"),
        ({"bnb_4bit_quant_type": "fp4"}, "has no tensor '.*bitsandbytes__fp4'"),
        ({"llm_int8_threshold": -1}, "llm_int8_threshold must be a number of at least 0"),
        ({"llm_int8_threshold": 10**400}, "llm_int8_threshold must be a number"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    four_bits(tmp_path)
    edit_quantization(tmp_path, **fields)
    with pytest.raises(ModelError, match=message):
        read_form(tmp_path, SHAPE)


STATE = "weight.quant_state.bitsandbytes__nf4"


def as_bytes(value: Any) -> Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


GOOD_STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(SHAPE)}


@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        ("weight.absmax", None, "has no tensor '.*absmax'"),
        ("weight.quant_map", None, "has no tensor '.*quant_map'"),
        ("weight.quant_map", torch.zeros(15), r"quant_map' has shape \[15\]; .* ask for \[16\]"),
        ("weight", torch.zeros(3, 1, dtype=torch.uint8), r"weight' has shape \[3, 1\]"),
        ("weight", torch.zeros(10240, 1, dtype=torch.int8), "is of int8; uint8 is wanted"),
        (STATE, None, "has no tensor '.*quant_state"),
        (STATE, as_bytes([1]), "is not a JSON object"),
        (STATE, torch.tensor([255], dtype=torch.uint8), "is not JSON"),
        (STATE, torch.zeros(1 << 17, dtype=torch.uint8), "it should be short JSON"),
        (STATE, as_bytes({**GOOD_STATE, "shape": [64, 321]}), r"shape \[64, 321\]; the config"),
        (STATE, as_bytes({**GOOD_STATE, "blocksize": 10**40}), "blocksize must be at most"),
        (STATE, as_bytes({**GOOD_STATE, "blocksize": None}), "blocksize is missing"),
        (STATE, as_bytes({**GOOD_STATE, "blocksize": 32}), r"absmax' has shape \[320\]"),
    ],
)
def test_tensors_that_are_refused(
    tmp_path: Path, part: str, tensor: Tensor | None, message: str
) -> None:
    four_bits(tmp_path)
    name = f"{PREFIX}.{part}"
    edit(
        tmp_path,
        lambda tensors: tensors.pop(name) if tensor is None else tensors.update({name: tensor}),
    )
    with pytest.raises(ModelError, match=message) as error:
        read_form(tmp_path, SHAPE)
    assert "model.safetensors" in str(error.value)


@pytest.mark.parametrize("part", ["weight.nested_quant_map", "weight.absmax"])
def test_parts_of_double_quantization(tmp_path: Path, part: str) -> None:
    four_bits(tmp_path, nested=True)
    edit(tmp_path, lambda tensors: tensors.pop(f"{PREFIX}.{part}"))
    with pytest.raises(ModelError, match=rf"has no tensor '{PREFIX}\.{part}'"):
        read_form(tmp_path, SHAPE)


def test_eight_bits_broken(tmp_path: Path) -> None:
    eight_bits(tmp_path)
    column = torch.tensor(1, dtype=torch.uint8)
    edit(tmp_path, lambda tensors: tensors.update({f"{PREFIX}.weight_format": column}))
    with pytest.raises(ModelError, match="weight_format' is not 0, by rows"):
        read_form(tmp_path, SHAPE)
    edit(tmp_path, lambda tensors: tensors.pop(f"{PREFIX}.weight_format"))
    q = torch.zeros(SHAPE, dtype=torch.int8)
    edit(tmp_path, lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.weight": q}))
    with pytest.raises(ModelError, match=r"has no tensor 'model\.layers\.1\.mlp\.up_proj\.SCB'"):
        read_form(tmp_path, SHAPE, "model.layers.1.mlp.up_proj")
