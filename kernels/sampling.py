"""Choosing tokens: temperature, min-p, top-k, top-p, in this order, and a draw among what is left.

min-p keeps tokens at least `min_p` times as likely as the likeliest, top-k the k likeliest of
those, top-p of those the fewest likeliest whose share is at least `top_p`. Tokens as likely as the
last one kept are kept too. The draw inverts the cumulative distribution in the order of token ids:
the first token at which it exceeds `uniform` is taken.
"""

import importlib
import math
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels import plain_sampling
from kernels.cpu import sampling as cpu_sampling
from kernels.plain_sampling import DrawParameters, likeliest
from kernels.triton import runtime

__all__ = [
    "NUM_PARAMETERS",
    "DrawParameters",
    "change_logits",
    "draw",
    "draw_from",
    "draw_packed",
    "likeliest",
    "likeliest_shares",
    "on_device",
    "pack",
    "probabilities",
]

# Numbers that a row's draw takes: what `pack` writes.
NUM_PARAMETERS = 5
# The steepest slope of the weights' exponent: a float32 that no logit's distance from the maximum
# turns into NaN. A lower temperature is greedy all the same.
_STEEPEST = 1e38


def on_device(logits: Tensor) -> bool:
    """Whether `draw_packed` can draw from these logits, without the host waiting for anything."""
    return runtime.runs_on(logits)


def draw(logits: Tensor, parameters: DrawParameters) -> Tensor:
    """A token for each row in plain PyTorch; logits float [S, vocabulary] -> int64 [S].

    A row of NaN gives some token of the vocabulary. Elsewhere than on a CPU this waits for the
    device.
    """
    return plain_sampling.draw(logits, parameters)


def probabilities(logits: Tensor, parameters: DrawParameters) -> Tensor:
    """What a token of each row is drawn from; logits float [S, vocabulary] -> float32 likewise.

    After temperature and filters, each row adding up to 1; temperature 0 gives all to the
    likeliest. `uniform` is not looked at. A row of NaN gives NaN. In plain PyTorch: where top-p
    filters, this waits for the device.
    """
    return plain_sampling.probabilities(logits, parameters)


def draw_from(masses: Tensor, uniform: Tensor) -> Tensor:
    """A token for each row, drawn in proportion to its masses as `draw` draws.

    masses: float32 [S, vocabulary], at least 0; a row need not add up to 1. uniform: float64 [S]
    in [0, 1), beside them. Returns int64 [S]; a row of NaN gives some token of the vocabulary.
    Does not wait for the device.
    """
    return plain_sampling.invert(masses, uniform.unsqueeze(1))


def likeliest_shares(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest token of each row and what it has of the row's softmax.

    logits float [S, vocabulary] -> int64 [S], float32 [S]. Does not wait for the device. A row with
    a NaN gives some token of the vocabulary.
    """
    shares = cpu_sampling.likeliest_shares(logits)
    return plain_sampling.likeliest_shares(logits) if shares is None else shares


def pack(parameters: DrawParameters, vocabulary: int) -> NDArray[np.float64]:
    """The parameters as `draw_packed` takes them: float64 [5, S].

    By row of the array: the slope of a weight's exponent to base two, the greatest distance of a
    logit from the maximum that min-p keeps, top-k, top-p, and the uniform number. The likeliest
    token is the first of those that a distance of 0 keeps.
    """
    temperature = np.array(parameters.temperature, dtype=np.float64)
    greedy = temperature == 0.0
    out = np.empty((NUM_PARAMETERS, len(temperature)))
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        out[0] = np.minimum(math.log2(math.e) / temperature, _STEEPEST)
        out[1] = temperature * np.log(np.array(parameters.min_p, dtype=np.float64))
    top_k = np.array([min(k, vocabulary) for k in parameters.top_k], dtype=np.float64)
    out[2] = np.where(top_k > 0, top_k, vocabulary)
    out[3] = parameters.top_p
    out[4] = parameters.uniform
    out[:, greedy] = [[1.0], [0.0], [float(vocabulary)], [1.0], [0.0]]
    return out


def draw_packed(logits: Tensor, packed: Tensor) -> Tensor:
    """A token for each row; logits [S, vocabulary], packed float64 [5, S] beside them.

    Needs `on_device`. Launches kernels and allocates by the shape of the logits alone, so it can
    be captured in a graph. Weights are float32 and sums float64: a draw differs from the exact one
    where `uniform` or a filter falls within about 1e-6 of a border between two tokens.
    """
    tokens: Tensor | None = _triton().draw(logits, packed)
    if tokens is None:
        tokens = _triton().draw(logits.float().contiguous(), packed)
    assert tokens is not None
    return tokens


def change_logits(logits: Tensor, places: Tensor, factors: Tensor, amounts: Tensor) -> None:
    """Change single logits in place: penalties, and tokens that are forbidden.

    logits float32 [S, vocabulary], contiguous; places int64 [E], distinct, into the flat logits;
    factors and amounts float32 [E]: a positive logit is divided by its factor, another multiplied,
    then the amount is subtracted; an infinite amount makes it minus infinity.

    Raises:
        ValueError: the logits are of another type or not contiguous.
    """
    if logits.dtype != torch.float32 or not logits.is_contiguous():
        raise ValueError(f"logits must be contiguous float32, not {logits.dtype}")
    if runtime.runs_on(logits):
        _triton().change_logits(logits, places, factors, amounts)
    else:
        plain_sampling.change_logits(logits, places, factors, amounts)


def _triton() -> ModuleType:
    # Imported when first needed: a machine without a GPU has no use for Triton and may lack it.
    return importlib.import_module("kernels.triton.sampling")
