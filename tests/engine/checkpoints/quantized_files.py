"""Folders of one quantized layer, or of a whole tiny model, written for tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.checkpoints.model_folder import open_model_folder
from engine.checkpoints.open_source import open_source
from engine.checkpoints.source import TensorSource
from engine.quantize.forms import LinearForm, dequantize
from tests.engine.tiny_llama import TinyLlama

PREFIX = "model.layers.0.mlp.up_proj"


def write(folder: Path, tensors: dict[str, Tensor], quantization: dict[str, Any] | None) -> Path:
    """A folder of `tensors` with a config that says `quantization`."""
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"]}
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / "model.safetensors")
    return folder


def layer(tensors: dict[str, Tensor], prefix: str = PREFIX) -> dict[str, Tensor]:
    """The tensors of one layer under their full names."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def source_of(folder: Path) -> TensorSource:
    return open_source(open_model_folder(folder))


def read_form(folder: Path, shape: tuple[int, int], prefix: str = PREFIX) -> LinearForm:
    return source_of(folder).linear(prefix, shape)


def read_weight(folder: Path, shape: tuple[int, int], prefix: str = PREFIX) -> Tensor:
    """The layer's weight through its form, float32 [N, K]."""
    return dequantize(read_form(folder, shape, prefix))


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a folder."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def edit_quantization(folder: Path, **fields: Any) -> None:
    """Change fields of the quantization config; a field of ... goes."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    quantization = {**config["quantization_config"], **fields}
    config["quantization_config"] = {k: v for k, v in quantization.items() if v is not ...}
    path.write_text(json.dumps(config))


def linear_prefixes(model: TinyLlama) -> list[str]:
    """Every linear layer of the blocks, by its name."""
    names = [name for name, _ in model.model.named_parameters()]
    return [n.removesuffix(".weight") for n in names if n.endswith("_proj.weight")]


def quantize_model(
    model: TinyLlama,
    quantize: Callable[[Tensor], tuple[dict[str, Tensor], Tensor]],
    quantization: dict[str, Any],
    head: bool = False,
) -> None:
    """Replace the linear layers of a model's folder, and put what they stand for into the model.

    `quantize(weight)` returns what a layer stores and its dequantized weight.
    """
    state = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    prefixes = linear_prefixes(model) + (["lm_head"] if head else [])
    for prefix in prefixes:
        stored, weight = quantize(state.pop(f"{prefix}.weight").float())
        state.update(layer(stored, prefix))
        with torch.no_grad():
            model.model.get_parameter(f"{prefix}.weight").copy_(weight)
    save_file({k: v.contiguous() for k, v in state.items()}, model.folder / "model.safetensors")
    path = model.folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = quantization
    path.write_text(json.dumps(config))
