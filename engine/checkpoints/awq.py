"""AWQ checkpoints in the layout "gemm" of AutoAWQ.

A layer [N, K] has `qweight` int32 [K, N / 8] and `qzeros` int32 [groups, N / 8], both 4-bit and
packed along N in an interleaved order, and `scales` [groups, N]:
`w[n, k] = (q[k, n] - zero[k // group, n]) * scales[k // group, n]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.checkpoints.packed_integers import unpack_words
from engine.checkpoints.safetensors_files import SafetensorsFiles
from engine.errors import ModelError
from engine.models.config_fields import ConfigFields
from engine.quantize.forms import IntGroupForm, LinearForm

BITS = 4
# The nibble of a word in which column j of its eight lies.
_NIBBLE_OF = (0, 4, 1, 5, 2, 6, 3, 7)


class AwqReader:
    """Reads AWQ layers; which modules are quantized shows from their tensors."""

    def __init__(self, files: SafetensorsFiles, config: ConfigFields) -> None:
        self._files = files
        values = config.values
        version = config.text("version", config.text("format", "gemm")).lower()
        if version != "gemm":
            raise ModelError(
                f"{config.source}: AWQ version {version!r} is not supported; supported is 'gemm', "
                "the version that AutoAWQ writes by default"
            )
        bits = values.get("bits", values.get("w_bit"))
        if bits != BITS:
            raise ModelError(f"{config.source}: bits of AWQ must be {BITS}, got {bits!r}")
        size = values.get("group_size", values.get("q_group_size"))
        if type(size) is not int or (size < 1 and size != -1):
            raise ModelError(
                f"{config.source}: group_size must be a positive number of columns or -1 for all, "
                f"got {size!r}"
            )
        self._group_size = size
        self._has_zeros = config.boolean("zero_point", True)

    @property
    def title(self) -> str:
        """For instance "awq int4 group 128"."""
        size = self._group_size
        return f"awq int{BITS} " + (f"group {size}" if size > 0 else "per channel")

    @property
    def notes(self) -> list[str]:
        """None: weight-only, nothing is left out."""
        return []

    def holds(self, prefix: str) -> bool:
        """Whether the module has packed integers."""
        return f"{prefix}.qweight" in self._files

    def kind(self, prefix: str) -> str:  # noqa: ARG002 - all layers are alike
        """For instance "4-bit AWQ in groups of 128"."""
        return f"{BITS}-bit AWQ in groups of {self._group_size}"

    def linear(self, prefix: str, shape: tuple[int, int]) -> LinearForm:
        """The weight [N, K] of a quantized module.

        Raises:
            ModelError: a part is missing, or of a wrong shape or dtype.
        """
        rows, columns = shape
        size = self._group_size if 0 < self._group_size < columns else columns
        if columns % size or rows % 8:
            raise self._files.problem(
                f"{prefix}.qweight",
                f"is of a layer {list(shape)}; AWQ needs columns in whole groups of {size} and "
                "rows in eights",
            )
        groups, words = columns // size, rows // 8
        packed = self._files.raw(f"{prefix}.qweight", (torch.int32,), (columns, words))
        scales = self._files.scales(f"{prefix}.scales", (groups, rows))
        name = f"{prefix}.qzeros"
        if self._has_zeros or name in self._files:
            zeros = _unpack(self._files.raw(name, (torch.int32,), (groups, words)), rows).float()
        else:
            zeros = torch.full((groups, rows), float(1 << (BITS - 1)))
        q = _unpack(packed, rows).T.contiguous()
        return IntGroupForm(q, scales.T.contiguous(), zeros.T.contiguous(), size, BITS)


def _unpack(words: Tensor, count: int) -> Tensor:
    """int32 [R, count / 8] -> uint8 [R, count] in the order of columns."""
    nibbles = unpack_words(words, BITS, count).view(words.shape[0], -1, 8)
    return nibbles[:, :, list(_NIBBLE_OF)].view(words.shape[0], count)
