"""Which format a model folder's weights are in, and the source that reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.checkpoints.awq import AwqReader
from engine.checkpoints.bitsandbytes import BitsAndBytesReader
from engine.checkpoints.compressed_tensors import CompressedTensorsReader
from engine.checkpoints.gguf.find import find_gguf
from engine.checkpoints.gguf.source import GgufSource
from engine.checkpoints.gptq import GptqReader
from engine.checkpoints.json_file import read_json_object
from engine.checkpoints.model_folder import ModelFolder
from engine.checkpoints.native_fp8 import NativeFp8Reader
from engine.checkpoints.quantized_source import LinearReader, QuantizedSource
from engine.checkpoints.safetensors_files import SafetensorsFiles
from engine.checkpoints.source import TensorSource
from engine.errors import ModelError
from engine.models.config_fields import ConfigFields

_READERS: dict[str, Callable[[SafetensorsFiles, ConfigFields], LinearReader]] = {
    "gptq": GptqReader,
    "awq": AwqReader,
    "compressed-tensors": CompressedTensorsReader,
    "fp8": NativeFp8Reader,
    "bitsandbytes": BitsAndBytesReader,
}
SUPPORTED = (*_READERS, "gguf")
# Files beside config.json in which older quantizers keep what it now holds.
_GPTQ_FILE, _AWQ_FILE = "quantize_config.json", "quant_config.json"
_HEAD = "lm_head"
_FLOATS = ("F64", "F32", "F16", "BF16")
# A tensor by whose name's end the formats that write it are known.
_MARKS = {
    ".qweight": ("gptq", "awq"),
    ".weight_packed": ("compressed-tensors",),
    ".weight_scale": ("compressed-tensors", "fp8"),
    ".weight_scale_inv": ("fp8",),
    ".SCB": ("bitsandbytes",),
    ".weight.absmax": ("bitsandbytes",),
    ".weight.quant_map": ("bitsandbytes",),
}


def open_source(folder: ModelFolder) -> TensorSource:
    """The tensors of a folder, read as its format asks.

    Raises:
        ModelError: no weights, broken ones, pickles, a quantization that is not read, a config that
            does not fit the tensors, or a folder with two formats.
    """
    gguf = find_gguf(folder.path)
    if gguf is not None:
        return GgufSource(gguf)
    beside = next(folder.path.glob("*.gguf"), None)
    if beside is not None:
        raise ModelError(
            f"{folder.path} holds weights in two formats, safetensors and {beside.name}: give the "
            "path of the .gguf file, or move it elsewhere to use the others"
        )
    files = SafetensorsFiles.open(folder.path)
    found = _quantization(folder)
    marked = _marks(files)
    if found is None:
        for name, methods in marked.items():
            raise files.problem(
                name,
                f"is quantized ({' or '.join(methods)}), but {folder.config_path} has no "
                "quantization_config",
            )
        return files
    method, config = found
    for name, methods in marked.items():
        if method not in methods:
            raise files.problem(
                name, f"is of {' or '.join(methods)}, but {config.source} says {method!r}"
            )
    if not marked:
        for name in sorted(files.names()):
            if name.endswith(".weight") and files.dtype(name) not in _FLOATS:
                raise files.problem(
                    name, f"is of {files.dtype(name)}, but no layer has the scales of {method!r}"
                )
        raise ModelError(
            f"{config.source} says {method!r}, but {folder.path} holds no tensor of that format: "
            "the weights are floats; remove the quantization_config to use them"
        )
    reader = _READERS[method](files, config)
    remarks = []
    if folder.config.get("tie_word_embeddings") is True and reader.holds(_HEAD):
        remarks.append(
            f"config.json ties the output head to the embedding, so the quantized {_HEAD} of the "
            "checkpoint is not used"
        )
    return QuantizedSource(files, reader, remarks)


def _quantization(folder: ModelFolder) -> tuple[str, ConfigFields] | None:
    """The method and its fields; None for floats.

    Raises:
        ModelError: a method that is not read, or two files that name different ones.
    """
    found = [
        (_method(values, source, default), ConfigFields(values, source))
        for values, source, default in _configs(folder)
    ]
    if len({method for method, _ in found}) > 1:
        raise ModelError(
            " but ".join(f"{config.source} says {method!r}" for method, config in found)
            + ": a folder holds one format"
        )
    return found[0] if found else None


def _configs(folder: ModelFolder) -> list[tuple[dict[str, Any], str, str | None]]:
    """Fields, where they stand, and the method where they name none; config.json's first."""
    configs: list[tuple[dict[str, Any], str, str | None]] = []
    values = folder.config.get("quantization_config")
    if values is not None:
        source = f"{folder.config_path}: quantization_config"
        if not isinstance(values, dict):
            raise ModelError(f"{source} must be an object, got {values!r}")
        configs.append((values, source, None))
    for name, method in ((_GPTQ_FILE, "gptq"), (_AWQ_FILE, "awq")):
        path = folder.path / name
        if path.is_file():
            configs.append((read_json_object(path), str(path), method))
    return configs


def _method(values: dict[str, Any], source: str, default: str | None) -> str:
    method = values.get("quant_method", default)
    if method is None and (values.get("load_in_4bit") or values.get("load_in_8bit")):
        method = "bitsandbytes"
    if isinstance(method, str) and method in _READERS:
        return method
    raise ModelError(
        f"{source}: quant_method {method!r} is not supported; supported are {', '.join(SUPPORTED)}"
    )


def _marks(files: SafetensorsFiles) -> dict[str, tuple[str, ...]]:
    """One tensor of each kind that only quantized checkpoints have, and the formats that do."""
    marked: dict[str, tuple[str, ...]] = {}
    wanted = dict(_MARKS)
    for name in sorted(files.names()):
        for mark in [mark for mark in wanted if name.endswith(mark)]:
            marked[name] = wanted.pop(mark)
    return marked
