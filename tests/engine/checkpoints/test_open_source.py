"""Which format a folder is in, folders that are of none or of two, and configs of any content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.checkpoints.model_folder import ModelFolder
from engine.checkpoints.open_source import open_source
from engine.checkpoints.safetensors_files import SafetensorsFiles
from engine.errors import ModelError
from engine.quantize.forms import DenseForm, dequantize
from tests.engine.checkpoints.gptq_packer import gptq_layer, random_integers
from tests.engine.checkpoints.quantized_files import (
    PREFIX,
    edit,
    layer,
    read_form,
    read_weight,
    source_of,
    write,
)

SHAPE = (16, 32)
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True}


def gptq_folder(folder: Path, config: dict[str, Any] | None = GPTQ) -> Path:
    q, zeros, scales = random_integers(*SHAPE, 4, 16, 0, True)
    stored, _ = gptq_layer(q, zeros, scales, 4, torch.arange(32) // 16)
    return write(folder, {**layer(stored), "model.norm.weight": torch.ones(32)}, config)


def test_floats(tmp_path: Path) -> None:
    weight = torch.randn(SHAPE)
    write(tmp_path, layer({"weight": weight}), None)
    source = source_of(tmp_path)
    assert isinstance(source, SafetensorsFiles)
    assert (source.quantization, source.notes) == (None, [])
    assert isinstance(source.linear(PREFIX, SHAPE), DenseForm)
    assert torch.equal(read_weight(tmp_path, SHAPE), weight)
    source.release()
    assert torch.equal(source.read(f"{PREFIX}.weight", SHAPE), weight)


def test_norms_of_a_quantized_model_are_floats(tmp_path: Path) -> None:
    source = source_of(gptq_folder(tmp_path))
    assert torch.equal(source.read("model.norm.weight", (32,)), torch.ones(32))
    with pytest.raises(ModelError, match=r"has shape \[32\], config.json asks for \[33\]"):
        source.read("model.norm.weight", (33,))
    source.release()
    assert "model.norm.weight" in source
    assert "model.norm" not in source
    with pytest.raises(ModelError, match=r"has no tensor 'lm_head\.weight'"):
        source.linear("lm_head", SHAPE)


def test_tensors_that_are_held_as_floats_are_said_to_be_dequantized(tmp_path: Path) -> None:
    folder = gptq_folder(tmp_path)
    source = source_of(folder)
    for _ in range(2):
        source.read(f"{PREFIX}.weight", SHAPE)
        assert source.notes == [
            f"1 tensor that this engine holds as floats ({PREFIX}.weight) is 4-bit GPTQ in groups "
            "of 16: dequantized to the model's dtype"
        ]


def test_a_quantized_head_that_is_tied_is_said_not_to_be_used(tmp_path: Path) -> None:
    folder = gptq_folder(tmp_path)
    edit(folder, lambda tensors: tensors.update({"lm_head.qweight": torch.zeros(4, 16).int()}))
    config = json.loads((folder / "config.json").read_text())
    assert source_of(folder).notes == []
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    (note,) = source_of(folder).notes
    assert "the quantized lm_head of the checkpoint is not used" in note


@pytest.mark.parametrize("method", ["torchao", "quip", "hqq", "aqlm", "eetq", "mxfp4", None, 4, []])
def test_methods_that_are_not_read(tmp_path: Path, method: Any) -> None:
    gptq_folder(tmp_path, {"quant_method": method})
    with pytest.raises(ModelError, match="is not supported; supported are gptq, awq, comp") as e:
        source_of(tmp_path)
    assert repr(method) in str(e.value)
    assert "config.json: quantization_config" in str(e.value)


def test_a_config_that_is_not_an_object(tmp_path: Path) -> None:
    gptq_folder(tmp_path, None)
    (tmp_path / "config.json").write_text('{"quantization_config": "gptq"}')
    with pytest.raises(ModelError, match="quantization_config must be an object, got 'gptq'"):
        source_of(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "quantize_config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"quantize_config\.json must hold a JSON object"):
        source_of(tmp_path)


def test_the_same_said_twice_is_no_conflict(tmp_path: Path) -> None:
    gptq_folder(tmp_path)
    (tmp_path / "quantize_config.json").write_text(json.dumps({**GPTQ, "bits": 8}))
    assert read_form(tmp_path, SHAPE).shape == SHAPE


@pytest.mark.parametrize("config", [None, GPTQ])
def test_two_configs_of_different_formats(tmp_path: Path, config: dict[str, Any] | None) -> None:
    gptq_folder(tmp_path, config)
    (tmp_path / "quant_config.json").write_text('{"w_bit": 4, "q_group_size": 16}')
    if config is None:
        (tmp_path / "quantize_config.json").write_text(json.dumps(GPTQ))
    with pytest.raises(ModelError, match=r"says 'gptq' but .*quant_config\.json says 'awq'"):
        source_of(tmp_path)


def test_tensors_of_another_format_than_the_config(tmp_path: Path) -> None:
    gptq_folder(tmp_path, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(ModelError, match=r"qweight' is of gptq or awq, but .*says 'bitsandbytes'"):
        source_of(tmp_path)
    gptq_folder(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"a.b.weight_packed": torch.ones(1)}))
    with pytest.raises(ModelError, match=r"a\.b\.weight_packed' is of compressed-tensors"):
        source_of(tmp_path)


def test_quantized_tensors_without_a_config(tmp_path: Path) -> None:
    gptq_folder(tmp_path, None)
    with pytest.raises(ModelError, match=r"qweight' is quantized \(gptq or awq\), but .* has no q"):
        source_of(tmp_path)


def test_a_config_without_quantized_tensors(tmp_path: Path) -> None:
    write(tmp_path, layer({"weight": torch.ones(SHAPE)}), GPTQ)
    with pytest.raises(ModelError, match="holds no tensor of that format: the weights are floats"):
        source_of(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "config"),
    [
        (torch.float8_e4m3fn, {"quant_method": "fp8"}),
        (torch.int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    ],
)
def test_quantized_tensors_that_all_lack_their_scales(
    tmp_path: Path, dtype: torch.dtype, config: dict[str, Any]
) -> None:
    write(tmp_path, layer({"weight": torch.ones(SHAPE).to(dtype)}), config)
    method = config["quant_method"]
    with pytest.raises(ModelError, match=rf"{PREFIX}\.weight' is of .*no layer has the .*{method}"):
        source_of(tmp_path)


def test_gguf_beside_safetensors(tmp_path: Path) -> None:
    gptq_folder(tmp_path)
    (tmp_path / "model-q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"in two formats, safetensors and model-q4\.gguf"):
        source_of(tmp_path)


def test_gguf_alone_is_left_to_its_reader(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"model\.gguf"):
        open_source(ModelFolder(tmp_path, {}, {}))


def test_a_folder_may_be_called_like_a_gguf_file(tmp_path: Path) -> None:
    folder = tmp_path / "model.gguf"
    folder.mkdir()
    assert source_of(gptq_folder(folder)).quantization == "gptq int4 group 16"


def test_a_single_file_of_another_name(tmp_path: Path) -> None:
    path = gptq_folder(tmp_path) / "model.safetensors"
    path = path.rename(tmp_path / "gptq_model-4bit-16g.safetensors")
    assert read_form(tmp_path, SHAPE).shape == SHAPE
    path = path.rename(tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(ModelError, match=r"model-00001-of-00002\.safetensors but no model\.safe"):
        source_of(tmp_path)
    path.rename(tmp_path / "b.safetensors")
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"has a\.safetensors, b\.safetensors but no model\.safe"):
        source_of(tmp_path)


def test_pickles_are_refused(tmp_path: Path) -> None:
    gptq_folder(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickles .* can run any code"):
        source_of(tmp_path)


@pytest.mark.parametrize("keep", [3, 100, -7])
def test_truncated(tmp_path: Path, keep: int) -> None:
    path = gptq_folder(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match="is truncated or not a safetensors file"):
        source_of(tmp_path)


FIELD = st.sampled_from(
    ["bits", "group_size", "sym", "dynamic", "format", "version", "meta", "config_groups",
     "group_0", "targets", "weights", "num_bits", "type", "strategy", "input_activations",
     "ignore", "weight_block_size", "activation_scheme", "load_in_4bit", "load_in_8bit",
     "bnb_4bit_quant_type", "llm_int8_threshold", "zero_point", "block_structure", "symmetric",
     "-:x", "+:.*", "kv_cache_scheme", "sparsity_config", "checkpoint_format"]
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([10**400, -(10**400), 10**12, [10**12, 10**12], "gptq", "re:(", "group"])
    | st.sampled_from(["int", "float", 4, 8, 16]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELD, inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def all_parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each format with a layer of right dtypes; configs decide what is wrong."""
    q, zeros, scales = random_integers(*SHAPE, 4, 16, 0, True)
    stored, _ = gptq_layer(q, zeros, scales, 4, torch.arange(32) // 16)
    fp8 = torch.ones(SHAPE).to(torch.float8_e4m3fn)
    packed = stored["qweight"].T.contiguous()
    tensors = {
        "gptq": stored,
        "awq": stored,
        "compressed-tensors": {"weight_packed": packed, "weight_scale": scales},
        "fp8": {"weight": fp8, "weight_scale": torch.ones(1)},
        "bitsandbytes": {"weight": torch.ones(SHAPE, dtype=torch.int8), "SCB": torch.ones(16)},
    }
    root = tmp_path_factory.mktemp("parts")
    return {
        method: write(root / method, layer(parts), {"quant_method": method})
        for method, parts in tensors.items()
    }


def read_or_refuse(folder: Path, config: dict[str, Any]) -> None:
    """Read the layer; a `ModelError`, and no other, may come, and names the folder."""
    refusal = None
    try:
        source = open_source(ModelFolder(folder, config, {}))
        form = source.linear(PREFIX, SHAPE)
    except ModelError as error:
        refusal = str(error)
    if refusal is not None:
        assert str(folder) in refusal
        return
    assert form.shape == SHAPE
    assert dequantize(form).shape == SHAPE
    assert source.quantization
    assert all(source.notes)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(["gptq", "awq", "compressed-tensors", "fp8", "bitsandbytes"]),
    st.dictionaries(FIELD, JSON, max_size=6),
)
def test_no_config_breaks_more_than_the_model(
    all_parts: dict[str, Path], method: str, fields: dict[str, Any]
) -> None:
    folder = all_parts[method]
    config = {"quantization_config": {**fields, "quant_method": method}}
    read_or_refuse(folder, config)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_no_bytes_break_more_than_the_model(
    all_parts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Bytes of a file changed, in its header above all."""
    method = data.draw(st.sampled_from(["gptq", "compressed-tensors"]))
    content = bytearray((all_parts[method] / "model.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(600, len(content) - 1)))] = data.draw(
            st.integers(0, 255)
        )
    folder = tmp_path_factory.getbasetemp() / "bytes"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(content)
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group",
                                                "group_size": 16}}  # fmt: skip
    extra = {"config_groups": {"g": group}, "format": "pack-quantized"}
    config = {"quantization_config": {**GPTQ, **extra, "quant_method": method}}
    if method != "gptq":
        del config["quantization_config"]["sym"]
    else:
        del config["quantization_config"]["format"]
    read_or_refuse(folder, config)
