"""From a float checkpoint to a quantized one of compressed-tensors, one layer in memory at a time.

The first shard holds what is no block: embeddings, the last norm, the output head (which stays in
floats, as the field writes it) and whatever else the files have. Then comes a shard a block.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoints.compressed_tensors import CompressedTensorsReader
from engine.checkpoints.model_folder import ModelFolder
from engine.checkpoints.open_source import open_source
from engine.checkpoints.quantized_source import QuantizedSource
from engine.checkpoints.safetensors_files import FLOAT_DTYPES, SafetensorsFiles
from engine.checkpoints.source import TensorSource
from engine.errors import ConfigError, EnvironmentLacks
from engine.models.config_fields import ConfigFields
from engine.models.registry import decoder_spec
from engine.models.spec import DecoderSpec
from engine.models.tensors import Root, layer_linears
from engine.quantize.calibrate import QuantizedLayer, quantize_layers
from engine.quantize.calibration_text import choose_windows
from engine.quantize.compressed_tensors import (
    Scheme,
    name_pattern,
    quantization_config,
    scheme_of,
    tensors_of,
)
from engine.quantize.content_key import ContentKey, content_key
from engine.quantize.forms import DenseForm
from engine.quantize.options import WriteOptions
from engine.quantize.quantize_layer import Recipe
from engine.quantize.shard_writer import ShardWriter, disk_errors
from engine.tokenizer import Tokenizer, load_tokenizer

# Called with the layers done and all of them; the first call tells what an earlier run had done.
OnLayer = Callable[[int, int], None]

# Buffers that some checkpoints carry beside their weights.
_OTHER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.tiktoken",
    "*preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


class Stopped(Exception):
    """Quantizing was told to stop; finished layers are on the disk."""


@dataclass(frozen=True, slots=True)
class Written:
    """A finished checkpoint; sizes in bytes, of weights alone.

    `calibration_tokens` is how many tokens went through the model, 0 if the method needs none.
    """

    folder: Path
    options: WriteOptions
    key: ContentKey
    source_bytes: int
    written_bytes: int
    calibration_tokens: int
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Plan:
    """Everything that is known before the first layer."""

    folder: ModelFolder
    spec: DecoderSpec
    options: WriteOptions
    source: SafetensorsFiles
    root: Root
    dtype: torch.dtype


def check_quantizable(folder: ModelFolder, options: WriteOptions) -> WriteOptions:
    """The options with nothing left open for this model; everything that can be said beforehand.

    Raises:
        ModelError: the model is broken or not supported.
        ConfigError: it is quantized already, or not a folder of safetensors.
    """
    return _plan(folder, options).options


def write_checkpoint(
    folder: ModelFolder,
    options: WriteOptions,
    text: str,
    out: Path,
    *,
    device: torch.device,
    on_layer: OnLayer | None = None,
    stop: threading.Event | None = None,
) -> Written:
    """Quantize the model in `folder` into `out`, going on with what an earlier run left there.

    `text` is what calibration reads. A run that was interrupted and one that was not end in the
    same bytes. The caller sees to it that nobody else writes into `out`, and removes the progress
    file (`forget_progress`) once it has nothing more to do there.

    Raises:
        Stopped: `stop` was set; the layer under way was finished.
        ModelError: a tensor is missing, unreadable or holds NaN.
        ConfigError: the model is quantized already, the options do not fit it, the text is too
            short, or `out` holds the beginning of something else.
        EnvironmentLacks: the disk is full or cannot be written, or memory does not suffice.
    """
    plan = _plan(folder, options)
    windows = torch.zeros((0, 0), dtype=torch.int64)
    if plan.options.calibrated:
        ids = _calibration_tokenizer(folder).encode(text)
        longest = plan.spec.max_position
        windows = choose_windows(ids, plan.options.calibration_tokens, longest, plan.options.seed)
    key = content_key(folder, plan.options, text)
    writer = ShardWriter(out, plan.spec.num_layers + 1, key)
    _check_room(plan, writer)
    done = max(0, len(writer.shards) - 1)
    if on_layer is not None:
        on_layer(done, plan.spec.num_layers)
    if not writer.shards:
        writer.add(_rest(plan))
        plan.source.release()
    with _memory_errors():
        for layer in _layers(plan, windows, writer, device, done):
            _write_layer(plan, writer, layer)
            if on_layer is not None:
                on_layer(layer.index + 1, plan.spec.num_layers)
            if stop is not None and stop.is_set() and layer.index + 1 < plan.spec.num_layers:
                raise Stopped
    _copy_companions(folder.path, out)
    writer.finish(_config(plan, writer))
    return Written(
        out,
        plan.options,
        key,
        source_bytes=_weight_bytes(folder.path),
        written_bytes=_weight_bytes(out),
        calibration_tokens=windows.numel(),
        notes=[note for shard in writer.shards for note in shard.notes],
    )


def _plan(folder: ModelFolder, options: WriteOptions) -> _Plan:
    spec = decoder_spec(folder)
    source = open_source(folder)
    if source.quantization is not None:
        raise ConfigError(
            f"{folder.path} is already quantized ({source.quantization}): give the unquantized "
            "model"
        )
    if not isinstance(source, SafetensorsFiles):
        raise ConfigError(
            f"{folder.path} is not a Hugging Face folder of safetensors, which is what is quantized"
        )
    return _Plan(
        folder,
        spec,
        options.resolved(),
        source,
        Root.find(spec, source),
        getattr(torch, spec.checkpoint_dtype),
    )


def _layers(
    plan: _Plan, windows: Tensor, writer: ShardWriter, device: torch.device, first: int
) -> Iterator[QuantizedLayer]:
    if first == plan.spec.num_layers:
        return iter(())
    return quantize_layers(
        plan.source,
        plan.spec,
        windows,
        recipe_of(plan.options, plan.dtype),
        plan.dtype,
        device,
        first_layer=first,
        written=_written_so_far(writer) if first else None,
    )


def recipe_of(options: WriteOptions, dtype: torch.dtype) -> Recipe:
    """What `quantize_layer` is to do; scales are rounded to the `dtype` that they are stored in."""
    method = options.method
    return Recipe(
        method="none" if method == "none" else _recipe_method(options),
        bits=options.weight_bits if options.weight_only else 4,
        group_size=options.columns_per_group,
        symmetric=bool(options.symmetric),
        activation_order=options.activation_order,
        sparsity=options.sparsity,
        fp8_scale_of=options.granularity,
        scale_dtype=dtype,
    )


def _recipe_method(options: WriteOptions) -> str:
    if options.method != "rtn":
        return options.method
    return "int4" if options.weight_only else "int8"


def _written_so_far(writer: ShardWriter) -> TensorSource:
    files = SafetensorsFiles(
        writer.folder,
        {name: writer.folder / file for name, file in writer.weight_map().items()},
        writer.folder,
    )
    config = quantization_config(_schemes(writer), [])
    if config is None:
        return files
    source = ConfigFields(config, str(writer.folder))
    return QuantizedSource(files, CompressedTensorsReader(files, source))


def _write_layer(plan: _Plan, writer: ShardWriter, layer: QuantizedLayer) -> None:
    tensors = dict(layer.tensors)
    schemes: dict[str, Scheme | None] = {}
    for prefix, form in layer.forms.items():
        scheme = schemes[prefix] = scheme_of(form, plan.options.symmetric)
        if isinstance(form, DenseForm):
            tensors[f"{prefix}.weight"] = form.weight.to(plan.dtype)
        else:
            assert scheme is not None
            tensors |= tensors_of(prefix, form, plan.dtype, scheme)
    replaced = {f"{prefix}.weight" for prefix in layer.forms}
    own = f"{plan.root.layer(layer.index)}."
    for name in sorted(plan.source.names()):
        if name.startswith(own) and name not in replaced and name not in tensors:
            tensors[name] = _stored(plan, name)
    writer.add(tensors, schemes, layer.notes)
    plan.source.release()


def _stored(plan: _Plan, name: str) -> Tensor:
    """A tensor as it is in the files, whatever it is of."""
    return plan.source.raw(name, (*FLOAT_DTYPES, *_OTHER_DTYPES))


def _rest(plan: _Plan) -> dict[str, Tensor]:
    """Every tensor that is in no block, as it is stored."""
    blocks = tuple(f"{plan.root.layer(index)}." for index in range(plan.spec.num_layers))
    return {
        name: _stored(plan, name)
        for name in sorted(plan.source.names())
        if not name.startswith(blocks)
    }


def _schemes(writer: ShardWriter) -> dict[str, Scheme | None]:
    return {name: scheme for shard in writer.shards for name, scheme in shard.schemes.items()}


def _config(plan: _Plan, writer: ShardWriter) -> dict[str, Any]:
    """The model's config with the `quantization_config` that the shards ask for."""
    schemes = _schemes(writer)
    config = quantization_config(schemes, _float_modules(plan))
    values = dict(plan.folder.config)
    return values if config is None else {**values, "quantization_config": config}


def _float_modules(plan: _Plan) -> list[str]:
    """Targets of what is or could be a linear layer and stays in floats: head, routers, towers."""
    ignore = ["lm_head"]
    if plan.spec.experts is not None:
        ignore.append(name_pattern(f"layers.0.{plan.spec.experts.block}.gate").replace("0", r"\d+"))
    # Towers of multimodal models beside the language model, by the first part of their names.
    ours = {plan.root.model, plan.root.head}
    towers = set()
    for name in plan.source.names():
        if not name.startswith(tuple(f"{prefix}." for prefix in ours)):
            parts = [part for part in name.split(".") if part not in ("model", "language_model")]
            towers.update(parts[:1])
    towers.discard("lm_head")
    return [*ignore, *(rf"re:.*{re.escape(tower)}\..*" for tower in sorted(towers))]


def _calibration_tokenizer(folder: ModelFolder) -> Tokenizer:
    return load_tokenizer(folder.path)


def _check_room(plan: _Plan, writer: ShardWriter) -> None:
    """Refuse a disk that cannot hold the result, before hours go into it."""
    spec, root, linear = plan.spec, plan.root, 0
    for index in range(spec.num_layers):
        parts = layer_linears(spec, root, index).values()
        linear += sum(sum(part.rows) * part.columns for part in parts)
    size = torch.finfo(plan.dtype).bits // 8
    total = _weight_bytes(plan.folder.path) - linear * size
    total += linear * plan.options.weight_bits // 8
    needed = total - sum(shard.size for shard in writer.shards)
    with disk_errors(writer.folder):
        free = shutil.disk_usage(writer.folder).free
    if free < needed:
        raise EnvironmentLacks(
            f"the disk of {writer.folder} has {free / 2**20:.0f} MiB left, and the checkpoint "
            f"needs about {needed / 2**20:.0f} MiB more: free some, or choose a folder on another"
        )


def _copy_companions(source: Path, out: Path) -> None:
    """Tokenizer, generation defaults and licence, as they are."""
    with disk_errors(out):
        for pattern in _COPIED:
            for file in sorted(source.glob(pattern)):
                if file.is_file() and file.suffix not in (".safetensors", ".py"):
                    shutil.copyfile(file, out / file.name)


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors") if file.is_file())


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise EnvironmentLacks(
            "one layer with its calibration does not fit the device's memory: lower "
            "--calibration-tokens, or quantize on the CPU"
        ) from error
