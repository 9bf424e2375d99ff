"""Safetensors whose linear layers are stored in one quantized format, as a `TensorSource`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from engine.checkpoints.safetensors_files import SafetensorsFiles
from engine.errors import ModelError
from engine.quantize.forms import (
    KERNEL_BITS,
    DenseForm,
    IntGroupForm,
    LinearForm,
    dequantize,
    has_path,
)


class LinearReader(Protocol):
    """Reads the linear layers of one format; a module that it does not hold is a plain float."""

    @property
    def title(self) -> str:
        """The format for people: "gptq int4 group 128"."""
        ...

    @property
    def notes(self) -> list[str]:
        """Sentences on what was read otherwise than it is stored, so far."""
        ...

    def holds(self, prefix: str) -> bool:
        """Whether the module `prefix` is stored quantized."""
        ...

    def linear(self, prefix: str, shape: tuple[int, int]) -> LinearForm:
        """The weight [N, K] of a module that it holds.

        Raises:
            ModelError: a part is missing, unreadable, or of a wrong shape, dtype or content.
        """
        ...

    def kind(self, prefix: str) -> str:
        """How `prefix` is stored, for people and without its name: "3-bit GPTQ"."""
        ...


class QuantizedSource:
    """Float tensors from the files, quantized ones through the reader of their format.

    `remarks` are sentences on the folder as a whole, which join the notes.
    """

    def __init__(
        self, files: SafetensorsFiles, reader: LinearReader, remarks: Sequence[str] = ()
    ) -> None:
        self._files = files
        self._reader = reader
        self._remarks = remarks
        self._dequantized: Counter[str] = Counter()
        self._widened: Counter[str] = Counter()
        self._as_floats: dict[str, list[str]] = {}

    @property
    def quantization(self) -> str | None:
        """The format for people."""
        return self._reader.title

    @property
    def notes(self) -> list[str]:
        """What was dequantized and why, and what the reader has to say."""
        layers = [
            f"{count} linear layer{'s are' if count > 1 else ' is'} {kind}, for which there is no "
            f"kernel: {instead}"
            for counts, instead in (
                (self._dequantized, "dequantized to the model's dtype"),
                (self._widened, "held in the next wider integers, of 4 or 8 bits"),
            )
            for kind, count in sorted(counts.items())
        ]
        floats = [
            f"{len(names)} {'tensors' if len(names) > 1 else 'tensor'} that this engine holds as "
            f"floats ({names[0]}{', …' if len(names) > 1 else ''}) "
            f"{'are' if len(names) > 1 else 'is'} {kind}: dequantized to the model's dtype"
            for kind, names in sorted(self._as_floats.items())
        ]
        return [*layers, *floats, *self._reader.notes, *self._remarks]

    def __contains__(self, name: str) -> bool:
        prefix = name.removesuffix(".weight")
        return name in self._files or (prefix != name and self._reader.holds(prefix))

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A float tensor; the weight of a quantized module is dequantized to float32.

        Raises:
            ModelError: missing, unreadable, or of another shape or dtype.
        """
        prefix = name.removesuffix(".weight")
        if prefix == name or not self._reader.holds(prefix) or len(shape) != 2:
            return self._files.read(name, shape)
        form = self._reader.linear(prefix, (shape[0], shape[1]))
        names = self._as_floats.setdefault(self._reader.kind(prefix), [])
        if name not in names:
            names.append(name)
        return dequantize(form)

    def linear(self, prefix: str, shape: tuple[int, int]) -> LinearForm:
        """The weight of a linear layer, quantized as it is stored.

        Raises:
            ModelError: as `read`.
        """
        if not self._reader.holds(prefix):
            return self._files.linear(prefix, shape)
        form = self._reader.linear(prefix, shape)
        if isinstance(form, DenseForm) or not has_path(form):
            self._dequantized[self._reader.kind(prefix)] += 1
        elif isinstance(form, IntGroupForm) and form.bits not in KERNEL_BITS:
            self._widened[self._reader.kind(prefix)] += 1
        return form

    def problem(self, name: str, text: str) -> ModelError:
        """An error on the tensor `name`, which names the file that holds it."""
        return self._files.problem(name, text)

    def release(self) -> None:
        """Unmap all files; they are mapped again when a tensor is read."""
        self._files.release()
