"""Forms of linear layers as compressed-tensors stores them, and the config that says so.

Layouts: the library's `pack_quantized` and `naive_quantized` compressors. A packed integer of b
bits is stored unsigned, element i at bit `i * b` of a row of 32-bit words, lowest bits first;
weights are packed along their columns and zeros along their rows. Scales are stored in the model's
dtype, as every reader expects them.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.quantize.forms import (
    DenseForm,
    Fp8Form,
    Int8ChannelForm,
    IntGroupForm,
    LinearForm,
    TableForm,
)

# Of the library that defines the format, as of when this writer was tested against it.
FORMAT_VERSION = "0.20.0"
_WORD = 32
_PACKED, _INT, _FLOAT = "pack-quantized", "int-quantized", "float-quantized"


@dataclass(frozen=True, slots=True)
class Scheme:
    """One kind of quantized layer, as a config group names it; `group_size` 0 is none."""

    format: str
    kind: str
    bits: int
    strategy: str
    group_size: int = 0
    symmetric: bool = True
    activations: bool = False
    activation_order: str | None = None

    def to_json(self, targets: list[str]) -> dict[str, Any]:
        """The config group of the modules that `targets` name."""
        weights = {
            "num_bits": self.bits,
            "type": self.kind,
            "symmetric": self.symmetric,
            "strategy": self.strategy,
            "group_size": self.group_size or None,
            "block_structure": None,
            "actorder": self.activation_order,
            "dynamic": False,
        }
        activations = {
            "num_bits": self.bits,
            "type": self.kind,
            "symmetric": True,
            "strategy": "token",
            "group_size": None,
            "block_structure": None,
            "dynamic": True,
        }
        return {
            "targets": targets,
            "weights": weights,
            "input_activations": activations if self.activations else None,
            "output_activations": None,
            "format": self.format,
        }


def scheme_of(form: LinearForm, symmetric: bool | None = None) -> Scheme | None:
    """How a form is stored; None for floats.

    `symmetric` says of integers in groups whether their zeros, all in the middle, are left out;
    None leaves them out where they are.

    Raises:
        ValueError: a form that compressed-tensors has no scheme for.
    """
    if isinstance(form, DenseForm):
        return None
    if isinstance(form, Int8ChannelForm):
        if form.outlier_threshold:
            raise ValueError("compressed-tensors has no scheme with outliers in floating point")
        return Scheme(_INT, "int", 8, "channel", activations=True)
    if isinstance(form, TableForm) or (isinstance(form, Fp8Form) and form.block_shape is not None):
        raise ValueError(f"compressed-tensors is not written from a {type(form).__name__}")
    if isinstance(form, Fp8Form):
        strategy = "tensor" if form.scales.numel() == 1 and form.shape[0] != 1 else "channel"
        return Scheme(_FLOAT, "float", 8, strategy, activations=True)
    if symmetric is None:
        symmetric = bool((form.zeros == 1 << (form.bits - 1)).all())
    # One group of all columns is a group too: layers of one checkpoint then share a scheme.
    return Scheme(
        _PACKED,
        "int",
        form.bits,
        "group",
        form.group_size,
        symmetric,
        activation_order=None if form.g_idx is None else "group",
    )


def tensors_of(
    prefix: str, form: LinearForm, dtype: torch.dtype, scheme: Scheme
) -> dict[str, Tensor]:
    """The tensors that store the layer `prefix` as `scheme` says; scales become `dtype`."""
    if isinstance(form, Int8ChannelForm):
        return {
            f"{prefix}.weight": form.q,
            f"{prefix}.weight_scale": form.scales.to(dtype)[:, None],
        }
    if isinstance(form, Fp8Form):
        scales = form.scales.to(dtype)
        return {
            f"{prefix}.weight": form.data,
            f"{prefix}.weight_scale": scales if scheme.strategy == "tensor" else scales[:, None],
        }
    assert isinstance(form, IntGroupForm)
    tensors = {
        f"{prefix}.weight_packed": pack_words(form.q, form.bits),
        f"{prefix}.weight_scale": form.scales.to(dtype),
        f"{prefix}.weight_shape": torch.tensor(form.shape),
    }
    if not scheme.symmetric:
        zeros = form.zeros.to(torch.uint8).T
        tensors[f"{prefix}.weight_zero_point"] = pack_words(zeros, form.bits).T.contiguous()
    if form.g_idx is not None:
        tensors[f"{prefix}.weight_g_idx"] = form.g_idx.to(torch.int32)
    return tensors


def pack_words(values: Tensor, bits: int) -> Tensor:
    """uint8 [R, C] below 2**bits -> int32 [R, ceil(C * bits / 32)]; `bits` divides 32."""
    per_word = _WORD // bits
    rows, columns = values.shape
    padded = torch.nn.functional.pad(values, (0, -columns % per_word)).to(torch.int64)
    shifts = torch.arange(0, _WORD, bits, device=values.device)
    words = (padded.reshape(rows, -1, per_word) << shifts).sum(dim=-1)
    # Words from 2**31 up are the negative int32 of the same bits.
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def quantization_config(
    schemes: Mapping[str, Scheme | None], ignore: Collection[str]
) -> dict[str, Any] | None:
    """The `quantization_config` of config.json; None if no layer is quantized.

    `schemes` has every linear layer of the blocks by name (None: floats), `ignore` what else is
    linear and stays in floats. The most frequent scheme targets all linear layers; layers of
    another are named one by one, which takes precedence.
    """
    counts = Counter(scheme for scheme in schemes.values() if scheme is not None)
    if not counts:
        return None
    common = max(counts, key=lambda scheme: (counts[scheme], str(dataclasses.astuple(scheme))))
    order = [common, *sorted(counts.keys() - {common}, key=lambda s: str(dataclasses.astuple(s)))]
    groups = {}
    for number, scheme in enumerate(order):
        named = [name_pattern(name) for name, found in schemes.items() if found == scheme]
        groups[f"group_{number}"] = scheme.to_json(["Linear"] if scheme is common else named)
    formats = {scheme.format for scheme in order}
    floats = [name_pattern(name) for name, scheme in schemes.items() if scheme is None]
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "config_groups": groups,
        "ignore": [*ignore, *floats],
        "kv_cache_scheme": None,
        "version": FORMAT_VERSION,
    }


def name_pattern(prefix: str) -> str:
    """A target that fits the module `prefix` under whatever name the whole model has for its root.

    Multimodal models of transformers call the language model otherwise than their files do.
    """
    start = prefix.find("layers.")
    tail = prefix[start:] if start >= 0 else prefix
    return "re:.*" + tail.replace(".", r"\.") + "$"
