"""What the loader asks of a checkpoint, whatever its format."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from engine.errors import ModelError
from engine.quantize.forms import LinearForm


class TensorSource(Protocol):
    """Tensors of one model by their Hugging Face names, read when asked for.

    What is returned may be a view of a mapped file that `release` unmaps: copy what should stay.
    """

    @property
    def quantization(self) -> str | None:
        """What the weights are quantized with, for people ("gptq int4 group 128"); None: floats."""
        ...

    @property
    def notes(self) -> list[str]:
        """Sentences on what was read otherwise than it is stored, so far."""
        ...

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor `name`, or a linear layer whose weight is `name`."""
        ...

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A float tensor, dequantized if it is stored quantized.

        Raises:
            ModelError: missing, unreadable, of another shape or dtype; file and tensor are named.
        """
        ...

    def linear(self, prefix: str, shape: tuple[int, int]) -> LinearForm:
        """The weight [N, K] of the linear layer `prefix` ("model.layers.0.mlp.up_proj").

        The bias, if any, is `read(prefix + ".bias", (N,))`.

        Raises:
            ModelError: as `read`.
        """
        ...

    def problem(self, name: str, text: str) -> ModelError:
        """An error on the tensor `name`, which names the file that holds it."""
        ...

    def release(self) -> None:
        """Unmap all files; they are mapped again when a tensor is read."""
        ...
