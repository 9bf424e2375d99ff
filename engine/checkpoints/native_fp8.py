"""FP8 checkpoints of `quant_method` "fp8": DeepSeek's blocks, or one scale for each tensor.

A layer has `weight` float8_e4m3fn [N, K] and `weight_scale_inv` (or `weight_scale`), which
multiplies it despite its name: float32 [ceil(N / rows), ceil(K / columns)] by blocks, one number,
or one for each row. Where activations are "static", `activation_scale` (or `input_scale`) is their
scale.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from engine.checkpoints.safetensors_files import SafetensorsFiles
from engine.errors import ModelError
from engine.models.config_fields import ConfigFields
from engine.quantize.forms import Fp8Form, LinearForm

FP8_DTYPE = "F8_E4M3"
_WEIGHT_SCALES = ("weight_scale_inv", "weight_scale")
_INPUT_SCALES = ("activation_scale", "input_scale")


class NativeFp8Reader:
    """Reads FP8 layers; a weight that is not stored as FP8 is a float."""

    def __init__(self, files: SafetensorsFiles, config: ConfigFields) -> None:
        self._files = files
        scheme = config.text("activation_scheme", "dynamic").lower()
        if scheme not in ("dynamic", "static"):
            raise ModelError(
                f"{config.source}: activation_scheme {scheme!r} is not supported; supported are "
                "dynamic and static"
            )
        self._activations: Literal["dynamic", "static"] = (
            "static" if scheme == "static" else "dynamic"
        )
        fmt = config.text("fmt", "e4m3").lower()
        if fmt not in ("e4m3", "float8_e4m3fn"):
            raise ModelError(f"{config.source}: fmt {fmt!r} is not supported; supported is e4m3")
        self._block = block_shape(config.values.get("weight_block_size"), config.source)
        if self._block is not None and scheme == "static":
            raise ModelError(
                f"{config.source}: activation_scheme 'static' with weight_block_size is not "
                "supported; blocks go with 'dynamic'"
            )

    @property
    def title(self) -> str:
        """For instance "fp8 e4m3 blocks 128x128, dynamic activations"."""
        by = "per tensor" if self._block is None else "blocks {}x{}".format(*self._block)
        return f"fp8 e4m3 {by}, {self._activations} activations"

    @property
    def notes(self) -> list[str]:
        """None: all is read as it is stored."""
        return []

    def holds(self, prefix: str) -> bool:
        """Whether the module's weight is stored as FP8."""
        name = f"{prefix}.weight"
        return name in self._files and self._files.dtype(name) == FP8_DTYPE

    def kind(self, prefix: str) -> str:  # noqa: ARG002 - all layers are alike
        """ "FP8"."""
        return "FP8"

    def linear(self, prefix: str, shape: tuple[int, int]) -> LinearForm:
        """The weight [N, K] of a quantized module.

        Raises:
            ModelError: a part is missing, or of a wrong shape, dtype or content.
        """
        data = self._files.raw(f"{prefix}.weight", (torch.float8_e4m3fn,), shape)
        name = _first(self._files, prefix, _WEIGHT_SCALES)
        block = fitted_block(self._block, shape)
        scales = fp8_scales(self._files, name, shape, block)
        if self._activations == "dynamic":
            return Fp8Form(data, scales, block)
        given = _first(self._files, prefix, _INPUT_SCALES)
        input_scale = self._files.scales(given, (), (1,)).reshape(1)
        return Fp8Form(data, scales, None, "static", input_scale)


def block_shape(value: object, source: str) -> tuple[int, int] | None:
    """Rows and columns of a block of a weight; None if `value` is.

    Raises:
        ModelError: not two positive integers.
    """
    if value is None:
        return None
    if (
        not isinstance(value, list)
        or len(value) != 2
        or any(type(size) is not int or size < 1 for size in value)
    ):
        raise ModelError(f"{source}: a block must be two positive integers, got {value!r}")
    return value[0], value[1]


def fitted_block(block: tuple[int, int] | None, shape: tuple[int, int]) -> tuple[int, int] | None:
    """A block no larger than the weight [N, K]: a file may name any size, and sizes take memory."""
    return None if block is None else (min(block[0], shape[0]), min(block[1], shape[1]))


def fp8_scales(
    files: SafetensorsFiles, name: str, shape: tuple[int, int], block: tuple[int, int] | None
) -> Tensor:
    """Scales as `Fp8Form` has them: [1], [N], or those of the blocks.

    Raises:
        ModelError: missing, of another shape, or not finite.
    """
    rows, columns = shape
    if block is not None:
        return files.scales(name, (-(-rows // block[0]), -(-columns // block[1])))
    return files.scales(name, (1,), (), (rows, 1), (rows,), (1, 1)).flatten()


def _first(files: SafetensorsFiles, prefix: str, names: tuple[str, ...]) -> str:
    """The tensor that is there; if none is, the first, which is then reported as missing."""
    full = [f"{prefix}.{name}" for name in names]
    return next((name for name in full if name in files), full[0])
