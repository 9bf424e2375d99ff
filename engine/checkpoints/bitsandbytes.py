"""Checkpoints of bitsandbytes: four bits by a table (NF4, FP4), and LLM.int8().

Four bits: `weight` uint8 [N K / 2, 1] holds the row-major weight two to a byte, the first in the
high half; `weight.quant_map` float32 [16] is the table and `weight.absmax` the scale of each block
of the flattened weight. With double quantization `weight.absmax` is uint8 and looks up
`weight.nested_quant_map` [256], scaled by `weight.nested_absmax` and shifted by an offset. The rest
is JSON in the bytes of `weight.quant_state.bitsandbytes__nf4` (or `__fp4`).

Eight bits: `weight` int8 [N, K] and `SCB` float32 [N]: `w = weight * SCB / 127`.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from engine.checkpoints.json_file import finite_number
from engine.checkpoints.safetensors_files import SafetensorsFiles
from engine.errors import ModelError
from engine.models.config_fields import ConfigFields
from engine.quantize.forms import DenseForm, Int8ChannelForm, LinearForm, TableForm

_TYPES = ("nf4", "fp4")
_LARGEST_STATE = 1 << 16
_LARGEST_BLOCK = 4096
_DEFAULT_THRESHOLD = 6.0


class BitsAndBytesReader:
    """Reads layers of bitsandbytes; which modules are quantized shows from their tensors."""

    def __init__(self, files: SafetensorsFiles, config: ConfigFields) -> None:
        self._files = files
        four = config.boolean("load_in_4bit", False)
        if four == config.boolean("load_in_8bit", False):
            raise ModelError(
                f"{config.source}: either load_in_4bit or load_in_8bit must be true for "
                "bitsandbytes"
            )
        self._four = four
        self._type = config.text("bnb_4bit_quant_type", "fp4")
        if four and self._type not in _TYPES:
            raise ModelError(
                f"{config.source}: bnb_4bit_quant_type {self._type!r} is not supported; supported "
                f"are {', '.join(_TYPES)}"
            )
        given = config.values.get("llm_int8_threshold", _DEFAULT_THRESHOLD)
        threshold = finite_number(given)
        if threshold is None or threshold < 0:
            raise ModelError(
                f"{config.source}: llm_int8_threshold must be a number of at least 0, got {given!r}"
            )
        self._threshold = threshold

    @property
    def title(self) -> str:
        """For instance "bitsandbytes nf4"."""
        return f"bitsandbytes {self._type if self._four else 'llm.int8()'}"

    @property
    def notes(self) -> list[str]:
        """None: all is read as it is stored."""
        return []

    def holds(self, prefix: str) -> bool:
        """Whether the module has what quantized ones have beside their weight."""
        if self._four:
            return f"{prefix}.weight.absmax" in self._files or self._stores(prefix, "U8")
        return f"{prefix}.SCB" in self._files or self._stores(prefix, "I8")

    def kind(self, prefix: str) -> str:  # noqa: ARG002 - all layers are alike
        """ "NF4 in blocks that cross rows", the only ones that are not kept."""
        return f"{self._type.upper()} in blocks that cross rows" if self._four else "LLM.int8()"

    def linear(self, prefix: str, shape: tuple[int, int]) -> LinearForm:
        """The weight [N, K] of a quantized module.

        Raises:
            ModelError: a part is missing, or of a wrong shape, dtype or content.
        """
        return self._four_bits(prefix, shape) if self._four else self._eight_bits(prefix, shape)

    def _eight_bits(self, prefix: str, shape: tuple[int, int]) -> LinearForm:
        layout = f"{prefix}.weight_format"
        if layout in self._files:
            code = self._files.raw(layout, (torch.uint8, torch.int8, torch.int32, torch.int64))
            if code.numel() != 1 or int(code.reshape(-1)[0]) != 0:
                raise self._files.problem(layout, "is not 0, by rows; only that is supported")
        q = self._files.raw(f"{prefix}.weight", (torch.int8,), shape)
        scales = self._files.scales(f"{prefix}.SCB", (shape[0],), (shape[0], 1)).flatten() / 127
        return Int8ChannelForm(q, scales, self._threshold)

    def _four_bits(self, prefix: str, shape: tuple[int, int]) -> LinearForm:
        rows, columns = shape
        count = rows * columns
        name = f"{prefix}.weight"
        state = self._state(name, shape)
        size = state.integer("blocksize")
        if size > _LARGEST_BLOCK:
            raise ModelError(
                f"{state.source}: blocksize must be at most {_LARGEST_BLOCK}, got {size}"
            )
        blocks = -(-count // size)
        packed = self._files.raw(
            name, (torch.uint8,), (-(-count // 2), 1), (1, -(-count // 2))
        ).flatten()
        q = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[:count].view(rows, columns)
        table = self._files.scales(f"{name}.quant_map", (16,))
        scales = self._absmax(name, blocks, state)
        if columns % size:
            # A scale serves the end of one row and the start of the next.
            spread = scales.repeat_interleave(size)[:count].view(rows, columns)
            return DenseForm(table[q.long()] * spread)
        return TableForm(q, scales.view(rows, columns // size), table, size)

    def _absmax(self, name: str, blocks: int, state: ConfigFields) -> Tensor:
        """float32 [blocks]."""
        absmax = f"{name}.absmax"
        if f"{name}.nested_absmax" not in self._files:
            return self._files.scales(absmax, (blocks,))
        codes = self._files.raw(absmax, (torch.uint8,), (blocks,)).long()
        size = state.integer("nested_blocksize")
        table = self._files.scales(f"{name}.nested_quant_map", (256,))
        outer = self._files.scales(f"{name}.nested_absmax", (-(-blocks // size),))
        offset = finite_number(state.values.get("nested_offset"))
        if offset is None:
            raise ModelError(f"{state.source}: nested_offset must be a finite number")
        spread = outer[torch.arange(blocks) // size]
        return table[codes] * spread + offset

    def _state(self, name: str, shape: tuple[int, int]) -> ConfigFields:
        """The JSON beside a 4-bit weight, checked against the layer."""
        kept = f"{name}.quant_state.bitsandbytes__{self._type}"
        content = self._files.raw(kept, (torch.uint8,)).flatten()
        if len(content) > _LARGEST_STATE:
            raise self._files.problem(kept, f"has {len(content)} bytes; it should be short JSON")
        try:
            state = json.loads(bytes(content.tolist()))
        except (ValueError, RecursionError) as error:
            raise self._files.problem(kept, f"is not JSON: {error}") from error
        if not isinstance(state, dict):
            raise self._files.problem(kept, "is not a JSON object")
        if state.get("quant_type") != self._type or state.get("shape") != list(shape):
            raise self._files.problem(
                kept,
                f"is of quant_type {state.get('quant_type')!r} and shape {state.get('shape')!r}; "
                f"the config asks for {self._type!r} and {list(shape)}",
            )
        return ConfigFields(state, str(self._files.problem(kept, "")).strip())

    def _stores(self, prefix: str, dtype: str) -> bool:
        name = f"{prefix}.weight"
        return name in self._files and self._files.dtype(name) == dtype
