"""How a checkpoint's weights are quantized already, as its config.json tells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.quantize.method_table import Activation

_SCALE_BYTES = 2  # float16; zeros take as many bits as an element


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """Bits of an element, and columns of a group that shares a scale (None: one by row).

    `activation` is what meets the weights: floats, or rounded in passing where the hardware has
    such units.
    """

    title: str
    bits: float
    group_size: int | None = None
    activation: Activation = "float"

    def bytes(self, rows: int, columns: int) -> int:
        """Bytes of one weight with its scales."""
        groups = -(-columns // self.group_size) if self.group_size else 1
        scales = rows * groups * (_SCALE_BYTES + (self.bits / 8 if self.group_size else 0.0))
        return round(rows * columns * self.bits / 8 + scales)


def stored_weights(config: dict[str, Any]) -> StoredWeights | None:
    """What `quantization_config` says; None where there is none, or nothing known in it.

    Microscaling formats (OCP 2023: a byte of scale for 32 elements; NVFP4 for 16) count their
    scales in the bits.
    """
    fields = config.get("quantization_config")
    if not isinstance(fields, dict):
        return None
    method = str(fields.get("quant_method", fields.get("quant_algo", "quantized")))[:40]
    if method == "mxfp4":
        return StoredWeights("mxfp4", 4 + 8 / 32)
    if method.lower() in ("nvfp4", "modelopt_fp4"):
        return StoredWeights("nvfp4", 4 + 8 / 16)
    if method == "fp8" or method.lower() == "modelopt":
        return StoredWeights("fp8", 8, None, "fp8")
    if fields.get("load_in_8bit") is True:
        return StoredWeights(f"{method} 8 bits", 8, None, "int8")
    if fields.get("load_in_4bit") is True:
        return StoredWeights(f"{method} 4 bits", 4, 64)
    activation: Activation = "float"
    groups = fields.get("config_groups")
    if isinstance(groups, dict) and groups:
        first = next(iter(groups.values()))
        first = first if isinstance(first, dict) else {}
        activation = _activation(first.get("input_activations"))
        weights = first.get("weights")
        fields = weights if isinstance(weights, dict) else {}
    bits = next((fields[n] for n in ("bits", "w_bit", "num_bits") if n in fields), None)
    size = next((fields[n] for n in ("group_size", "q_group_size") if n in fields), None)
    if type(bits) is not int or not 1 <= bits <= 16:
        return None
    group = size if type(size) is int and 0 < size <= 1 << 20 else None
    return StoredWeights(f"{method} {bits} bits", bits, group, activation)


def _activation(fields: object) -> Activation:
    """What rows are rounded to, by a scheme of compressed-tensors."""
    if not isinstance(fields, dict) or fields.get("num_bits") != 8:
        return "float"
    return "fp8" if fields.get("type") == "float" else "int8"
