"""Checkpoints of compressed-tensors (LLM Compressor, and what this project writes).

"pack-quantized": `weight_packed` int32 [N, K b / 32], packed along K, each integer stored plus
2**(b - 1); `weight_scale` [N, groups]; `weight_zero_point` int32 [N b / 32, groups], packed along
dimension 0 and shifted alike, where the weight is asymmetric; `weight_g_idx` [K] where columns were
quantized in another order; `weight_shape` [2]. "int-quantized", "float-quantized" and
"naive-quantized": `weight` int8 or float8_e4m3fn [N, K] as it is. `w = (q - zero_point) * scale`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Literal

import torch
from torch import Tensor

from engine.checkpoints.compressed_tensors_config import PACKED, Scheme, Schemes
from engine.checkpoints.group_index import read_group_index
from engine.checkpoints.native_fp8 import fitted_block, fp8_scales
from engine.checkpoints.packed_integers import unpack_words, words_for
from engine.checkpoints.safetensors_files import SafetensorsFiles
from engine.models.config_fields import ConfigFields
from engine.quantize.forms import Fp8Form, Int8ChannelForm, IntGroupForm, LinearForm

_PLAIN_DTYPES = ("I8", "F8_E4M3")


class CompressedTensorsReader:
    """Reads layers of compressed-tensors; which are quantized shows from their tensors."""

    def __init__(self, files: SafetensorsFiles, config: ConfigFields) -> None:
        self._files = files
        self._schemes = Schemes(config)
        self._remarks: Counter[str] = Counter()
        self._has_cache_scales = bool(config.values.get("kv_cache_scheme"))

    @property
    def title(self) -> str:
        """For instance "compressed-tensors int4 group 128"."""
        kinds = list(dict.fromkeys(scheme.describe() for scheme in self._schemes.all))
        return f"compressed-tensors {' and '.join(kinds)}"

    @property
    def notes(self) -> list[str]:
        """Where activations are rounded otherwise than the checkpoint asks."""
        notes = [
            f"{count} linear layer{'s ask' if count > 1 else ' asks'} for {remark}"
            for remark, count in sorted(self._remarks.items())
        ]
        if self._has_cache_scales:
            notes.append(
                "the checkpoint's fixed scales of the KV cache are not used: kv_cache_dtype "
                "decides, with scales of each token's own"
            )
        return notes

    def holds(self, prefix: str) -> bool:
        """Whether the module's weight is packed, int8 or FP8."""
        name = f"{prefix}.weight"
        if f"{prefix}.weight_packed" in self._files:
            return True
        if name not in self._files:
            # A scale alone: the weight is missing, which reading it reports.
            return f"{prefix}.weight_scale" in self._files
        if self._files.dtype(name) in _PLAIN_DTYPES:
            return True
        if f"{name}_scale" in self._files:
            raise self._files.problem(
                name,
                "is float but has a weight_scale: the checkpoint was saved before compression; "
                "save it with save_compressed=True",
            )
        return False

    def kind(self, prefix: str) -> str:
        """For instance "int3 group 128"."""
        return self._scheme(prefix).describe()

    def linear(self, prefix: str, shape: tuple[int, int]) -> LinearForm:
        """The weight [N, K] of a quantized module.

        Raises:
            ModelError: a part is missing, or of a wrong shape, dtype or content.
        """
        scheme = self._scheme(prefix)
        if scheme.kind == "float":
            return self._fp8(prefix, shape, scheme)
        packed = scheme.format == PACKED or (
            scheme.format is None and f"{prefix}.weight_packed" in self._files
        )
        q = self._packed(prefix, shape, scheme) if packed else self._plain(prefix, shape, scheme)
        scales = self._int_scales(prefix, shape, scheme)
        if self._as_w8a8(scheme):
            return Int8ChannelForm((q.to(torch.int16) - 128).to(torch.int8), scales[:, 0])
        zeros = self._zeros(prefix, scales, packed, scheme)
        size = scheme.group_size if scheme.strategy == "group" else shape[1]
        g_idx = read_group_index(
            self._files, f"{prefix}.weight_g_idx", shape[1], scales.shape[1], size
        )
        return IntGroupForm(q, scales, zeros, size, scheme.bits, g_idx)

    def _scheme(self, prefix: str) -> Scheme:
        scheme = self._schemes.of(prefix)
        if scheme is None:
            name = next(
                (n for n in (f"{prefix}.weight_packed", f"{prefix}.weight") if n in self._files),
                f"{prefix}.weight_scale",
            )
            raise self._files.problem(
                name, f"is quantized, but no group of {self._schemes.source} targets its layer"
            )
        return scheme

    def _as_w8a8(self, scheme: Scheme) -> bool:
        """Whether the layer multiplies int8 by int8; says what of its activations is not kept."""
        asked = scheme.activations
        if asked is None:
            return False
        if (
            asked.kind == "int"
            and (asked.bits, scheme.bits) == (8, 8)
            and scheme.symmetric
            and scheme.strategy in ("tensor", "channel")
        ):
            if asked.static or not asked.symmetric:
                how = "static" if asked.static else "asymmetric"
                self._remarks[
                    f"{how} int8 activations: each token's are rounded by its own symmetric scale"
                ] += 1
            return True
        rounded = f"int{asked.bits}" if asked.kind == "int" else f"fp{asked.bits}"
        self._remarks[
            f"{rounded} activations beside {scheme.bits}-bit weights: activations stay floats"
        ] += 1
        return False

    def _packed(self, prefix: str, shape: tuple[int, int], scheme: Scheme) -> Tensor:
        """uint8 [N, K], shifted by 2**(bits - 1) as it is stored."""
        rows, columns = shape
        name = f"{prefix}.weight_shape"
        if name in self._files:
            stored = self._files.raw(name, (torch.int64, torch.int32), (2,)).tolist()
            if stored != list(shape):
                raise self._files.problem(
                    name, f"says {stored}, config.json asks for {list(shape)}"
                )
        words = self._files.raw(
            f"{prefix}.weight_packed", (torch.int32,), (rows, words_for(columns, scheme.bits))
        )
        return unpack_words(words, scheme.bits, columns)

    def _plain(self, prefix: str, shape: tuple[int, int], scheme: Scheme) -> Tensor:
        """uint8 [N, K], shifted like packed ones."""
        name = f"{prefix}.weight"
        q = self._files.raw(name, (torch.int8,), shape).to(torch.int16) + (1 << (scheme.bits - 1))
        if q.numel() and (int(q.min()) < 0 or int(q.max()) >= 1 << scheme.bits):
            raise self._files.problem(name, f"holds integers of more than {scheme.bits} bits")
        return q.to(torch.uint8)

    def _int_scales(self, prefix: str, shape: tuple[int, int], scheme: Scheme) -> Tensor:
        """float32 [N, groups]."""
        rows, columns = shape
        name = f"{prefix}.weight_scale"
        if scheme.strategy == "group":
            groups = -(-columns // scheme.group_size)
            return self._files.scales(name, (rows, groups))
        if scheme.strategy == "channel":
            return self._files.scales(name, (rows, 1), (rows,)).reshape(rows, 1)
        return self._files.scales(name, (1,), (), (1, 1)).reshape(1, 1).repeat(rows, 1)

    def _zeros(self, prefix: str, scales: Tensor, packed: bool, scheme: Scheme) -> Tensor:
        """float32 [N, groups], shifted like the integers."""
        rows, groups = scales.shape
        middle = 1 << (scheme.bits - 1)
        if scheme.symmetric:
            return torch.full((rows, groups), float(middle))
        name = f"{prefix}.weight_zero_point"
        if packed and scheme.strategy in ("group", "channel"):
            words = self._files.raw(name, (torch.int32,), (words_for(rows, scheme.bits), groups))
            return unpack_words(words.T, scheme.bits, rows).T.float().contiguous()
        shapes: list[tuple[int, ...]] = (
            [(rows, groups)] if scheme.strategy != "tensor" else [(1,), (), (1, 1)]
        )
        if groups == 1:
            shapes.append((rows,))
        zeros = self._files.raw(name, (torch.int8,), *shapes).float() + middle
        return zeros.reshape(-1, groups).expand(rows, groups).contiguous()

    def _fp8(self, prefix: str, shape: tuple[int, int], scheme: Scheme) -> LinearForm:
        data = self._files.raw(f"{prefix}.weight", (torch.float8_e4m3fn,), shape)
        block = scheme.block
        if scheme.strategy == "group":
            block = (1, scheme.group_size)
        block = fitted_block(block, shape)
        scales = fp8_scales(self._files, f"{prefix}.weight_scale", shape, block)
        form = Fp8Form(data, scales, block, self._fp8_activations(scheme))
        if form.activations != "static":
            return form
        given = self._files.scales(f"{prefix}.input_scale", (1,), (), (1, 1))
        return dataclasses.replace(form, input_scale=given.reshape(1))

    def _fp8_activations(self, scheme: Scheme) -> Literal["none", "dynamic", "static"]:
        asked = scheme.activations
        if asked is None:
            return "none"
        if asked.kind != "float" or asked.bits != 8:
            self._remarks[f"{asked.kind}{asked.bits} activations: they stay floats"] += 1
            return "none"
        return "static" if asked.static else "dynamic"
