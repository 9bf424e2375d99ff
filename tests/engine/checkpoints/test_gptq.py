"""GPTQ layers against a packer and a dequantizer written from the specification."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoints.packed_integers import unpack_words, words_for
from engine.errors import ModelError
from engine.quantize.forms import IntGroupForm, has_path, pack
from kernels.ops import DenseWeight
from tests.engine.checkpoints.gptq_packer import (
    gptq_layer,
    pack_rows,
    random_integers,
)
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


def config(bits: int = 4, group_size: int = 32, **fields: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group_size, **fields}


def make(
    folder: Path,
    bits: int = 4,
    group_size: int = 32,
    version: int = 1,
    symmetric: bool = False,
    shuffled: bool = False,
    seed: int = 0,
    **fields: Any,
) -> torch.Tensor:
    """Write one layer and return its weight, float64."""
    size = SHAPE[1] if group_size == -1 else group_size
    q, zeros, scales = random_integers(*SHAPE, bits, size, seed, symmetric)
    g_idx = torch.arange(SHAPE[1]) // size
    if shuffled:
        g_idx = g_idx[torch.randperm(SHAPE[1], generator=torch.Generator().manual_seed(seed))]
    stored, weight = gptq_layer(q, zeros, scales, bits, g_idx, version)
    name = "gptq" if version == 1 else "gptq_v2"
    write(
        folder,
        layer(stored),
        config(bits, group_size, checkpoint_format=name, sym=symmetric, **fields),
    )
    return weight


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 32, 77])
def test_unpacking_any_width(bits: int, count: int) -> None:
    values = torch.randint(0, 1 << bits, (5, count))
    words = pack_rows(values, bits)
    assert words.shape[1] == words_for(count, bits)
    assert torch.equal(unpack_words(words, bits, count).long(), values)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("group_size", [32, -1, 96])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weight_is_exact(
    tmp_path: Path, bits: int, group_size: int, version: int, symmetric: bool
) -> None:
    weight = make(tmp_path, bits, group_size, version, symmetric, seed=bits)
    # q - zero has 8 bits and a scale 11, so float32 holds the products exactly.
    assert torch.equal(read_weight(tmp_path, SHAPE).double(), weight)


def test_zeros_of_nought_survive_the_first_version(tmp_path: Path) -> None:
    """A zero of 0 borrows from its neighbour when 1 is subtracted from the packed word."""
    q, zeros, scales = random_integers(*SHAPE, 4, 32, 0, False)
    zeros[3:9] = 0
    stored, weight = gptq_layer(q, zeros, scales, 4, torch.arange(96) // 32)
    write(tmp_path, layer(stored), config())
    assert torch.equal(read_weight(tmp_path, SHAPE).double(), weight)


@pytest.mark.parametrize("symmetric", [True, False])
def test_three_bits_as_gptqmodel_subtracts(tmp_path: Path, symmetric: bool) -> None:
    """GPTQModel's constants of three bits lie in another order than the fields."""
    q, zeros, scales = random_integers(*SHAPE, 3, 32, 1, symmetric)
    stored, weight = gptq_layer(q, zeros, scales, 3, torch.arange(96) // 32, version=2)
    constants = torch.tensor(
        [0b00100100100100100100100100100100, 0b10010010010010010010010010010010,
         0b01001001001001001001001001001001]
    )  # fmt: skip
    wrapped = (stored["qzeros"].long() - constants) & 0xFFFFFFFF
    stored["qzeros"] = torch.where(wrapped >> 31 > 0, wrapped - (1 << 32), wrapped).int()
    meta = {} if symmetric else {"meta": {"quantizer": ["gptqmodel:2.0.0"]}}
    write(tmp_path, layer(stored), config(3, sym=symmetric, **meta))
    assert torch.equal(read_weight(tmp_path, SHAPE).double(), weight)


@pytest.mark.parametrize("bits", [4, 8])
def test_columns_in_another_order(tmp_path: Path, bits: int) -> None:
    weight = make(tmp_path, bits, shuffled=True, desc_act=True)
    form = read_form(tmp_path, SHAPE)
    assert isinstance(form, IntGroupForm)
    assert form.g_idx is not None
    assert has_path(form)
    assert torch.equal(read_weight(tmp_path, SHAPE).double(), weight)


def test_groups_of_unequal_size_are_dequantized_and_said_to_be(tmp_path: Path) -> None:
    make(tmp_path, desc_act=True)
    g_idx = (torch.arange(96) // 32).int()
    g_idx[0] = 2
    edit(tmp_path, lambda tensors: tensors.update({f"{PREFIX}.g_idx": g_idx}))
    source = source_of(tmp_path)
    form = source.linear(PREFIX, SHAPE)
    assert not has_path(form)
    assert "4-bit GPTQ in groups of 32, for which there is no kernel: dequ" in source.notes[0]
    packed = pack([form], None, torch.float32)
    assert isinstance(packed, DenseWeight)
    assert torch.equal(packed.data, read_weight(tmp_path, SHAPE))


def test_order_of_columns_that_is_plain_is_dropped(tmp_path: Path) -> None:
    make(tmp_path, desc_act=True)
    form = read_form(tmp_path, SHAPE)
    assert isinstance(form, IntGroupForm)
    assert form.g_idx is None
    edit(tmp_path, lambda tensors: tensors.pop(f"{PREFIX}.g_idx"))
    assert isinstance(read_form(tmp_path, SHAPE), IntGroupForm)


def test_what_is_said_of_it(tmp_path: Path) -> None:
    make(tmp_path, 3)
    source = source_of(tmp_path)
    assert source.quantization == "gptq int3 group 32"
    assert source.notes == []
    source.linear(PREFIX, SHAPE)
    (note,) = source.notes
    assert note.startswith("1 linear layer is 3-bit GPTQ in groups of 32, for which there is no")
    assert f"{PREFIX}.weight" in source
    assert f"{PREFIX}.bias" not in source
    assert torch.equal(source.read(f"{PREFIX}.weight", SHAPE), read_weight(tmp_path, SHAPE))


def test_older_repositories_keep_their_config_beside(tmp_path: Path) -> None:
    weight = make(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "quantize_config.json").write_text(
        json.dumps({"bits": 4, "group_size": 32, "desc_act": False, "sym": False})
    )
    assert torch.equal(read_weight(tmp_path, SHAPE).double(), weight)


def test_dynamic_overrides(tmp_path: Path) -> None:
    other = "model.layers.1.mlp.up_proj"
    q, zeros, scales = random_integers(*SHAPE, 4, 32, 0, True)
    four, weight4 = gptq_layer(q, zeros, scales, 4, torch.arange(96) // 32)
    q, zeros, scales = random_integers(*SHAPE, 8, 48, 1, True)
    eight, weight8 = gptq_layer(q, zeros, scales, 8, torch.arange(96) // 48)
    floats = torch.randn(SHAPE)
    tensors = {**layer(four), **layer(eight, other), "lm_head.weight": floats}
    rules = {"-:lm_head": {}, r"+:.*\.1\..*up_proj": {"bits": 8, "group_size": 48}}
    write(tmp_path, tensors, config(dynamic=rules))
    assert torch.equal(read_weight(tmp_path, SHAPE).double(), weight4)
    assert torch.equal(read_weight(tmp_path, SHAPE, other).double(), weight8)
    assert torch.equal(read_weight(tmp_path, SHAPE, "lm_head"), floats)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 5}, "bits of GPTQ must be one of 2, 3, 4, 8, got 5"),
        ({"bits": "4"}, "bits of GPTQ must be one of"),
        ({"group_size": 0}, "group_size must be a positive number of columns or -1"),
        ({"group_size": ...}, "group_size must be .* got None"),
        ({"sym": "yes"}, "sym must be true or false"),
        ({"checkpoint_format": "marlin"}, "'marlin' is not supported; supported are gptq, gptq_v2"),
        ({"pack_dtype": "int64"}, "pack_dtype must be int32"),
        ({"dynamic": [1]}, "dynamic must be an object of patterns"),
        ({"dynamic": {"+:(": {}}}, "is not a regular expression"),
        ({"dynamic": {"+:(a|a)*$": {}}}, "could take too long to match"),
        ({"dynamic": {"+:" + ".*" * 6: {}}}, "could take too long to match"),
        ({"dynamic": {"+:" + ".?" * 5: {}}}, "could take too long to match"),
        ({"dynamic": {"+:" + "a" * 2000: {}}}, "could take too long to match"),
        ({"dynamic": {"+:x": {"bits": 7}}}, "dynamic: '\\+:x': bits of GPTQ"),
        ({"dynamic": {"-:.*up_proj": {}}}, "is quantized, but .* excludes the layer"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    make(tmp_path)
    edit_quantization(tmp_path, **fields)
    with pytest.raises(ModelError, match=message) as error:
        read_form(tmp_path, SHAPE)
    assert "config.json" in str(error.value)


@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        ("qzeros", None, r"has no tensor '.*qzeros' of shape \[3, 4\]"),
        ("scales", None, r"has no tensor '.*scales'"),
        ("qweight", torch.zeros(12, 31, dtype=torch.int32), r"qweight' has shape \[12, 31\]; .*32"),
        ("qweight", torch.zeros(12, 32, dtype=torch.int64), "is of int64; int32 is wanted"),
        ("scales", torch.full((3, 32), torch.nan), "infinite or not a number"),
        ("g_idx", torch.full((96,), 3, dtype=torch.int32), r"groups from 3 to 3; .* 0 to 2"),
        ("g_idx", torch.full((96,), -1, dtype=torch.int32), "groups from -1"),
        ("g_idx", torch.zeros(95, dtype=torch.int32), r"has shape \[95\]"),
    ],
)
def test_tensors_that_are_refused(
    tmp_path: Path, part: str, tensor: torch.Tensor | None, message: str
) -> None:
    make(tmp_path)
    name = f"{PREFIX}.{part}"
    edit(
        tmp_path,
        lambda tensors: tensors.pop(name) if tensor is None else tensors.update({name: tensor}),
    )
    with pytest.raises(ModelError, match=message) as error:
        read_form(tmp_path, SHAPE)
    assert "model.safetensors" in str(error.value)
    assert name in str(error.value)
