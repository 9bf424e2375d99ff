"""Layers of compressed-tensors, written and read back by the library itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from compressed_tensors.utils.match import match_targets
from torch import Tensor

from engine.checkpoints.compressed_tensors_config import Schemes
from engine.errors import ModelError
from engine.models.config_fields import ConfigFields
from engine.quantize.forms import Fp8Form, Int8ChannelForm, IntGroupForm, has_path
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

SHAPE = (48, 96)
DYNAMIC = {"num_bits": 8, "dynamic": True, "strategy": "token"}
FP8 = {"num_bits": 8, "type": "float"}


def ranges(weight: Tensor, args: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The least and greatest of what shares a scale, in the scales' shape."""
    rows, columns = weight.shape
    strategy = args["strategy"]
    if strategy == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1)
    if strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if strategy == "group":
        parts = weight.view(rows, -1, args["group_size"])
        return parts.amin(2), parts.amax(2)
    height, width = args["block_structure"]
    padded = torch.zeros(-(-rows // height) * height, -(-columns // width) * width)
    padded[:rows, :columns] = weight
    blocks = padded.view(-1, height, padded.shape[1] // width, width)
    return blocks.amin((1, 3)), blocks.amax((1, 3))


def make(
    folder: Path,
    form: str,
    weights: dict[str, Any],
    activations: dict[str, Any] | None = None,
    extra: dict[str, Tensor] | None = None,
    **fields: Any,
) -> Tensor:
    """Write one layer that the library compressed; what the library decompresses it to."""
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=args,
        input_activations=QuantizationArgs(**activations) if activations else None,
    )
    low, high = ranges(weight, {**weights, "strategy": args.strategy})
    scale, zero_point = calculate_qparams(low, high, args)
    compressor = BaseCompressor.get_value_from_registry(form)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point}
    stored = compressor.compress(state, scheme)
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    write(
        folder,
        {**layer(stored), **layer(extra or {})},
        {
            "quant_method": "compressed-tensors",
            "format": form,
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
            "quantization_status": "compressed",
            **fields,
        },
    )
    decompressed: Tensor = compressor.decompress(stored, scheme)["weight"]
    return decompressed


def integers(bits: int, strategy: str, symmetric: bool) -> dict[str, Any]:
    size = {"group_size": 32} if strategy == "group" else {}
    return {
        "num_bits": bits, "type": "int", "strategy": strategy, "symmetric": symmetric, **size
    }  # fmt: skip


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["group", "channel"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_packed_integers(tmp_path: Path, bits: int, strategy: str, symmetric: bool) -> None:
    wanted = make(tmp_path, "pack-quantized", integers(bits, strategy, symmetric))
    form = read_form(tmp_path, SHAPE)
    assert isinstance(form, IntGroupForm)
    assert has_path(form)
    assert torch.equal(read_weight(tmp_path, SHAPE), wanted)


def test_packed_by_tensor(tmp_path: Path) -> None:
    wanted = make(tmp_path, "pack-quantized", integers(4, "tensor", True))
    assert torch.equal(read_weight(tmp_path, SHAPE), wanted)


def test_columns_in_another_order(tmp_path: Path) -> None:
    """`weight_g_idx`, which the library no longer writes: by the formula of its format."""
    make(tmp_path, "pack-quantized", integers(4, "group", False))
    in_order = read_form(tmp_path, SHAPE)
    assert isinstance(in_order, IntGroupForm)
    g_idx = (torch.arange(96) // 32)[torch.randperm(96)]
    edit(tmp_path, lambda tensors: tensors.update({f"{PREFIX}.weight_g_idx": g_idx.int()}))
    wanted = (in_order.q.double() - in_order.zeros.double()[:, g_idx]) * in_order.scales.double()[
        :, g_idx
    ]
    assert torch.allclose(read_weight(tmp_path, SHAPE).double(), wanted, rtol=1e-6)


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_w8a8(tmp_path: Path, strategy: str) -> None:
    wanted = make(tmp_path, "int-quantized", integers(8, strategy, True), DYNAMIC)
    form = read_form(tmp_path, SHAPE)
    assert isinstance(form, Int8ChannelForm)
    assert torch.equal(read_weight(tmp_path, SHAPE), wanted)
    source = source_of(tmp_path)
    source.linear(PREFIX, SHAPE)
    assert source.notes == []
    described = f"int8 {strategy}, dynamic int8 activations"
    assert source.quantization == f"compressed-tensors {described}"


@pytest.mark.parametrize(
    ("activations", "note"),
    [
        ({"num_bits": 8, "strategy": "tensor", "dynamic": False}, "asks for static int8 activat"),
        ({**DYNAMIC, "symmetric": False}, "asks for asymmetric int8 activations"),
    ],
)
def test_activations_that_are_rounded_otherwise(
    tmp_path: Path, activations: dict[str, Any], note: str
) -> None:
    scale = {"input_scale": torch.tensor([0.1])}
    wanted = make(tmp_path, "int-quantized", integers(8, "channel", True), activations, scale)
    source = source_of(tmp_path)
    assert isinstance(source.linear(PREFIX, SHAPE), Int8ChannelForm)
    assert note in source.notes[0]
    assert torch.equal(read_weight(tmp_path, SHAPE), wanted)


@pytest.mark.parametrize("bits", [4, 8])
def test_weight_only_integers_that_are_not_packed(tmp_path: Path, bits: int) -> None:
    wanted = make(tmp_path, "naive-quantized", integers(bits, "group", False))
    form = read_form(tmp_path, SHAPE)
    assert isinstance(form, IntGroupForm)
    assert torch.equal(read_weight(tmp_path, SHAPE), wanted)


def test_four_bits_with_int8_activations_say_so(tmp_path: Path) -> None:
    wanted = make(tmp_path, "int-quantized", integers(4, "group", True), DYNAMIC)
    source = source_of(tmp_path)
    assert isinstance(source.linear(PREFIX, SHAPE), IntGroupForm)
    assert "int8 activations beside 4-bit weights: activations stay floats" in source.notes[0]
    assert torch.equal(read_weight(tmp_path, SHAPE), wanted)


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
@pytest.mark.parametrize("activations", [None, {**FP8, **DYNAMIC}])
def test_fp8(tmp_path: Path, strategy: str, activations: dict[str, Any] | None) -> None:
    block = {"block_structure": [32, 40]} if strategy == "block" else {}
    weights = {**FP8, "strategy": strategy, **block}
    form_name = "float-quantized" if activations else "naive-quantized"
    wanted = make(tmp_path, form_name, weights, activations)
    form = read_form(tmp_path, SHAPE)
    assert isinstance(form, Fp8Form)
    assert form.activations == ("dynamic" if activations else "none")
    assert torch.equal(read_weight(tmp_path, SHAPE), wanted)


def test_fp8_with_static_activations(tmp_path: Path) -> None:
    activations = {**FP8, "strategy": "tensor", "dynamic": False}
    weights = {**FP8, "strategy": "tensor"}
    make(tmp_path, "float-quantized", weights, activations, {"input_scale": torch.tensor([0.25])})
    form = read_form(tmp_path, SHAPE)
    assert isinstance(form, Fp8Form)
    assert form.input_scale is not None
    assert (form.activations, form.input_scale.tolist()) == ("static", [0.25])
    edit(tmp_path, lambda tensors: tensors.pop(f"{PREFIX}.input_scale"))
    with pytest.raises(ModelError, match=r"has no tensor '.*input_scale'"):
        read_form(tmp_path, SHAPE)


def test_cache_scales_are_said_not_to_be_used(tmp_path: Path) -> None:
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    make(tmp_path, "pack-quantized", integers(4, "group", True), kv_cache_scheme=scheme)
    assert "scales of the KV cache are not used" in source_of(tmp_path).notes[0]


@pytest.mark.parametrize(
    "name",
    ["model.layers.3.mlp.down_proj", "model.layers.13.self_attn.q_proj", "lm_head", "model.gate"],
)
def test_targets_as_the_library_matches_them(name: str) -> None:
    """Which of overlapping targets decides, against the library's own choice."""
    widths = {
        "Linear": 8,
        r"re:.*down_proj$": 4,
        r"re:model\.layers\.1.*": 3,
        "model.layers.3.mlp.down_proj": 2,
        "lm_head": 5,
    }
    groups = {
        f"group_{i}": {"targets": [target], "weights": {"num_bits": bits, "strategy": "channel"}}
        for i, (target, bits) in enumerate(widths.items())
    }
    schemes = Schemes(ConfigFields({"config_groups": groups}, "config.json"))
    scheme = schemes.of(name)
    assert scheme is not None
    best = match_targets(name, torch.nn.Linear(2, 2), list(widths))[0]
    assert scheme.bits == widths[best]


def test_ignored_and_mixed_groups(tmp_path: Path) -> None:
    groups = {
        "group_0": {"targets": ["Linear"], "weights": integers(4, "group", True)},
        "group_1": {"targets": ["re:.*gate"], "format": "int-quantized",
                    "weights": integers(8, "channel", True), "input_activations": DYNAMIC},
    }  # fmt: skip
    wanted = make(
        tmp_path,
        "pack-quantized",
        groups["group_0"]["weights"],
        config_groups=groups,
        format="mixed-precision",
        ignore=["re:.*router", "lm_head"],
    )
    gate, router = "model.layers.0.mlp.gate", "model.layers.0.router"
    q, floats = torch.randint(-128, 128, SHAPE, dtype=torch.int8), torch.randn(SHAPE)
    added = {
        f"{gate}.weight": q,
        f"{gate}.weight_scale": torch.full((48, 1), 0.5),
        f"{router}.weight": floats,
    }
    edit(tmp_path, lambda tensors: tensors.update(added))
    assert torch.equal(read_weight(tmp_path, SHAPE), wanted)
    assert isinstance(read_form(tmp_path, SHAPE, gate), Int8ChannelForm)
    assert torch.equal(read_weight(tmp_path, SHAPE, gate), q.float() * 0.5)
    assert torch.equal(read_weight(tmp_path, SHAPE, router), floats)
    described = source_of(tmp_path).quantization
    assert described is not None
    assert "int4 group 32 and int8 channel" in described


def group(**fields: Any) -> dict[str, Any]:
    weights = {**integers(4, "group", True), **fields}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "marlin-24"}, "format 'marlin-24' .* is not supported; supported are pack-q"),
        ({"format": "nvfp4-pack-quantized"}, "'nvfp4-pack-quantized' .* is not supported"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config of format"),
        ({"transform_config": {"config_groups": {}}}, "transform_config .* not supported"),
        ({"config_groups": {}}, "config_groups must be an object"),
        ({"config_groups": {"group_0": 3}}, "group_0 must be an object, got 3"),
        (group(num_bits=9), "num_bits=9 of type int is not supported"),
        (group(num_bits=4, type="float"), "num_bits=4 of type float is not supported"),
        (group(type="text"), "type must be int or float"),
        (group(strategy="row"), "strategy 'row' is not supported"),
        (group(group_size=None), "group_size is missing"),
        (group(group_size="big"), "group_size must be"),
        (group(strategy="block"), "strategy 'block' is supported for float alone"),
        ({"ignore": "lm_head"}, "ignore must be a list of texts"),
        ({"ignore": ["re:("]}, "is not a regular expression"),
        ({"ignore": [r"re:.*\.mlp\..*"]}, "is quantized, but no group of .* targets its layer"),
        (group(num_bits=3), r"weight_packed' has shape \[48, 12\]; the layer and .* \[48, 9\]"),
        (group(group_size=48), r"weight_scale' has shape \[48, 3\]; .* \[48, 2\]"),
        (group(symmetric=False), r"has no tensor '.*weight_zero_point'"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    make(tmp_path, "pack-quantized", integers(4, "group", True))
    edit_quantization(tmp_path, **fields)
    with pytest.raises(ModelError, match=message) as error:
        read_form(tmp_path, SHAPE)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        ("weight_scale", None, "has no tensor '.*weight_scale'"),
        ("weight_packed", None, "has no tensor '.*weight_packed'"),
        ("weight_shape", torch.tensor([48, 95]), r"weight_shape' says \[48, 95\]"),
        ("weight_scale", torch.full((48, 3), torch.inf), "infinite or not a number"),
        ("weight_packed", torch.zeros(48, 12), "is of float32; int32 is wanted"),
    ],
)
def test_tensors_that_are_refused(
    tmp_path: Path, part: str, tensor: Tensor | None, message: str
) -> None:
    make(tmp_path, "pack-quantized", integers(4, "group", True))
    name = f"{PREFIX}.{part}"
    edit(
        tmp_path,
        lambda tensors: tensors.pop(name) if tensor is None else tensors.update({name: tensor}),
    )
    with pytest.raises(ModelError, match=message):
        read_form(tmp_path, SHAPE)


def test_integers_wider_than_the_config_says(tmp_path: Path) -> None:
    make(tmp_path, "int-quantized", integers(8, "channel", True), DYNAMIC)
    edit_quantization(tmp_path, config_groups={
        "group_0": {"targets": ["Linear"], "weights": integers(4, "channel", True)}
    })  # fmt: skip
    with pytest.raises(ModelError, match=r"\.weight' holds integers of more than 4 bits"):
        read_form(tmp_path, SHAPE)


def test_a_checkpoint_saved_before_compression(tmp_path: Path) -> None:
    make(tmp_path, "int-quantized", integers(8, "channel", True), DYNAMIC)
    edit(tmp_path, lambda tensors: tensors.update({f"{PREFIX}.weight": torch.ones(SHAPE)}))
    with pytest.raises(ModelError, match="is float but has a weight_scale"):
        read_form(tmp_path, SHAPE)
