"""A checkpoint some of whose tensors were replaced."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from engine.checkpoints.source import TensorSource
from engine.errors import ModelError
from engine.quantize.forms import LinearForm, dequantize


class Overlay:
    """`forms` by the prefix of a linear layer and `tensors` by name, before those of `base`."""

    def __init__(
        self, base: TensorSource, forms: Mapping[str, LinearForm], tensors: Mapping[str, Tensor]
    ) -> None:
        self._base = base
        self._forms = forms
        self._tensors = tensors

    @property
    def quantization(self) -> str | None:
        """That of `base`."""
        return self._base.quantization

    @property
    def notes(self) -> list[str]:
        """Those of `base`."""
        return self._base.notes

    def __contains__(self, name: str) -> bool:
        return (
            name in self._tensors or name.removesuffix(".weight") in self._forms
        ) or name in self._base

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A float tensor.

        Raises:
            ModelError: as `TensorSource.read`.
        """
        found = self._tensors.get(name)
        form = self._forms.get(name.removesuffix(".weight"))
        if found is None and form is not None:
            found = dequantize(form)
        return self._base.read(name, shape) if found is None else _checked(found, name, shape)

    def linear(self, prefix: str, shape: tuple[int, int]) -> LinearForm:
        """The weight of a linear layer.

        Raises:
            ModelError: as `TensorSource.linear`.
        """
        form = self._forms.get(prefix)
        if form is None:
            return self._base.linear(prefix, shape)
        if form.shape != shape:
            raise ModelError(f"{prefix}: replaced by {form.shape}, wanted {shape}")
        return form

    def problem(self, name: str, text: str) -> ModelError:
        """An error on the tensor `name`, which names the file that holds it."""
        return self._base.problem(name, text)

    def release(self) -> None:
        """Unmap the files of `base`."""
        self._base.release()


def _checked(tensor: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) != tuple(shape):
        raise ModelError(f"{name}: replaced by {tuple(tensor.shape)}, wanted {tuple(shape)}")
    return tensor
