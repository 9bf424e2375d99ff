"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them.

A layer [N, K] of b bits has `qweight` int32 [K b / 32, N], packed along K; `qzeros` int32
[groups, N b / 32], packed along N; `scales` [groups, N]; and `g_idx` int32 [K], the group of each
column: `w[n, k] = (q[k, n] - zero[g_idx[k], n]) * scales[g_idx[k], n]`.

In the first version of the format the stored zero is one less than the zero, subtracted from the
packed word; `checkpoint_format` "gptq_v2" stores it as it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.checkpoints.group_index import read_group_index
from engine.checkpoints.module_patterns import compile_pattern
from engine.checkpoints.packed_integers import add_to_words, unpack_words, words_for
from engine.checkpoints.safetensors_files import SafetensorsFiles
from engine.errors import ModelError
from engine.models.config_fields import ConfigFields
from engine.quantize.forms import IntGroupForm, LinearForm

BITS = (2, 3, 4, 8)
FORMATS = ("gptq", "gptq_v2")
# One in every field of a word.
_ONES = {2: (0x55555555,), 4: (0x11111111,), 8: (0x01010101,)}
# Three-bit fields cross words, so ones lie differently in each of three words ...
_ONES_3 = (0x49249249, 0x92492492, 0x24924924)
# ... and GPTQModel subtracts the constants in the opposite order; what it wrote is read back so.
_ONES_3_GPTQMODEL = (0x24924924, 0x92492492, 0x49249249)


@dataclass(frozen=True, slots=True)
class GptqLayer:
    """How one layer is quantized; `group_size` is in columns, -1 for one group of all."""

    bits: int
    group_size: int
    symmetric: bool


class GptqReader:
    """Reads GPTQ layers; which modules are quantized shows from their tensors."""

    def __init__(self, files: SafetensorsFiles, config: ConfigFields) -> None:
        self._files = files
        self._source = config.source
        self._default = _layer(config, None)
        name = config.text("checkpoint_format", config.text("format", "gptq"))
        if name not in FORMATS:
            raise ModelError(
                f"{config.source}: GPTQ checkpoint_format {name!r} is not supported; supported "
                f"are {', '.join(FORMATS)}"
            )
        self._first_version = name == "gptq"
        if config.text("pack_dtype", "int32") != "int32":
            raise ModelError(f"{config.source}: pack_dtype must be int32")
        meta = config.values.get("meta")
        quantizer = str(meta.get("quantizer", "")) if isinstance(meta, dict) else ""
        self._by_gptqmodel = "gptqmodel" in quantizer.lower()
        self._rules = _rules(config, self._default)

    @property
    def title(self) -> str:
        """For instance "gptq int4 group 128"."""
        size = self._default.group_size
        return f"gptq int{self._default.bits} " + (f"group {size}" if size > 0 else "per channel")

    @property
    def notes(self) -> list[str]:
        """None: weight-only, nothing is left out."""
        return []

    def holds(self, prefix: str) -> bool:
        """Whether the module has packed integers."""
        return f"{prefix}.qweight" in self._files

    def kind(self, prefix: str) -> str:
        """For instance "3-bit GPTQ"."""
        layer = self._layer_of(prefix)
        return f"{layer.bits}-bit GPTQ in groups of {layer.group_size}"

    def linear(self, prefix: str, shape: tuple[int, int]) -> LinearForm:
        """The weight [N, K] of a quantized module.

        Raises:
            ModelError: a part is missing, or of a wrong shape, dtype or content.
        """
        rows, columns = shape
        layer = self._layer_of(prefix)
        bits = layer.bits
        size = layer.group_size if 0 < layer.group_size < columns else columns
        groups = -(-columns // size)
        packed = self._files.raw(
            f"{prefix}.qweight", (torch.int32,), (words_for(columns, bits), rows)
        )
        scales = self._files.scales(f"{prefix}.scales", (groups, rows))
        zeros = self._zeros(prefix, groups, rows, layer)
        return IntGroupForm(
            unpack_words(packed.T, bits, columns),
            scales.T.contiguous(),
            zeros.T.float().contiguous(),
            size,
            bits,
            read_group_index(self._files, f"{prefix}.g_idx", columns, groups, size),
        )

    def _zeros(self, prefix: str, groups: int, rows: int, layer: GptqLayer) -> Tensor:
        """uint8 [groups, N]."""
        name, bits = f"{prefix}.qzeros", layer.bits
        packed = self._files.raw(name, (torch.int32,), (groups, words_for(rows, bits)))
        if not self._first_version:
            return unpack_words(packed, bits, rows)
        if bits != 3:
            return unpack_words(add_to_words(packed, _ONES[bits]), bits, rows)
        choices = [_ONES_3, _ONES_3_GPTQMODEL]
        read = [unpack_words(add_to_words(packed, ones), bits, rows) for ones in choices]
        middle = 1 << (bits - 1)
        # A symmetric weight has its zero in the middle, which tells who wrote it for certain.
        if layer.symmetric:
            for zeros in read:
                if bool((zeros == middle).all()):
                    return zeros
        return read[1] if self._by_gptqmodel else read[0]

    def _layer_of(self, prefix: str) -> GptqLayer:
        for pattern, layer in self._rules:
            if pattern.match(prefix):
                if layer is None:
                    raise self._files.problem(
                        f"{prefix}.qweight",
                        f"is quantized, but {self._source} excludes the layer by "
                        f"{pattern.pattern!r}",
                    )
                return layer
        return self._default


def _layer(config: ConfigFields, default: GptqLayer | None) -> GptqLayer:
    values: dict[str, Any] = config.values
    bits = values.get("bits", default.bits if default else None)
    if type(bits) is not int or bits not in BITS:
        raise ModelError(
            f"{config.source}: bits of GPTQ must be one of {', '.join(map(str, BITS))}, got "
            f"{bits!r}"
        )
    size = values.get("group_size", default.group_size if default else None)
    if type(size) is not int or (size < 1 and size != -1):
        raise ModelError(
            f"{config.source}: group_size must be a positive number of columns or -1 for all, "
            f"got {size!r}"
        )
    return GptqLayer(bits, size, config.boolean("sym", default.symmetric if default else True))


def _rules(
    config: ConfigFields, default: GptqLayer
) -> list[tuple[re.Pattern[str], GptqLayer | None]]:
    """Overrides by layer, first match wins: "-:pattern" excludes, others change fields."""
    dynamic = config.values.get("dynamic")
    if not dynamic:
        return []
    source = f"{config.source}: dynamic"
    if not isinstance(dynamic, dict):
        raise ModelError(f"{source} must be an object of patterns, got {dynamic!r}")
    rules: list[tuple[re.Pattern[str], GptqLayer | None]] = []
    for text, fields in dynamic.items():
        excluded = text.startswith("-:")
        pattern = compile_pattern(text.removeprefix("-:").removeprefix("+:"), source)
        if excluded:
            rules.append((pattern, None))
            continue
        if not isinstance(fields, dict):
            raise ModelError(f"{source}: {text!r} must hold an object, got {fields!r}")
        rules.append((pattern, _layer(ConfigFields(fields, f"{source}: {text!r}"), default)))
    return rules
