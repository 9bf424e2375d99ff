"""Medusa's heads: small networks on the model's last hidden state that guess further tokens.

Cai et al. 2024, "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads",
section 2.1. From the hidden state whose logits gave a token, head i (from 0) guesses the token that
comes i + 1 places after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import ModelError
from engine.quantize import forms
from engine.quantize.methods import quantize_weight
from kernels import ops
from kernels.ops import LinearWeight

# Scores that are looked at together, and how many times as many groups as are looked into pay.
_GROUP = 64
_LEAST_GROUPS = 4


@dataclass(frozen=True, slots=True)
class ResidualLayer:
    """One residual block of a head: weight float [hidden, hidden] and bias [hidden], if any."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class HeadWeights:
    """One head: its residual blocks, and its output projection float [rows, hidden].

    Without an output of its own it ends in the model's output head. All heads of a model are alike
    in this, and have as many layers.
    """

    layers: tuple[ResidualLayer, ...]
    output: Tensor | None = None


@dataclass(frozen=True, slots=True)
class MedusaWeights:
    """All heads of a model as floats.

    `token_map` int64 [rows] says which token each row of the outputs stands for, where they have
    not the whole vocabulary. `calibration` is, for each head and each rank of its guesses, how many
    times as often such a guess was right (where all heads before had been) as the head's own
    probability said; ranks beyond the last have the last's. Empty: not measured, taken as 1.
    """

    heads: tuple[HeadWeights, ...]
    token_map: Tensor | None = None
    calibration: tuple[tuple[float, ...], ...] = ()

    @property
    def num_layers(self) -> int:
        """Residual blocks of each head."""
        return len(self.heads[0].layers)


class Guesses(NamedTuple):
    """The likeliest tokens of each head, likeliest first.

    token_ids int64 and probabilities float32, both [rows, heads, ranks].
    """

    token_ids: Tensor
    probabilities: Tensor


def residual(x: Tensor, projected: Tensor) -> Tensor:
    """A residual block's output from its input and its linear layer's output: x + SiLU(Wx + b)."""
    return x + F.silu(projected)


class MedusaHeads:
    """Heads laid out for a device.

    Args:
        weights: the heads; their `calibration` is kept beside them.
        dtype: the model's, in which they are computed.
        device: the model's.
        shared_output: the model's output head, for heads without one of their own; `soft_cap`
            bounds its scores (`DecoderSpec.logit_soft_cap`), 0 does not.
        quantization: "none", or a method of `engine.quantize.methods` that needs no calibration;
            what the model generates does not depend on it.

    Raises:
        ModelError: a weight that cannot be quantized.
    """

    def __init__(
        self,
        weights: MedusaWeights,
        dtype: torch.dtype,
        device: torch.device,
        shared_output: LinearWeight | None = None,
        quantization: str = "none",
        soft_cap: float = 0.0,
    ) -> None:
        def pack(weight: Tensor, bias: Tensor | None = None) -> LinearWeight:
            placed = weight.to(device, dtype)
            try:
                form = quantize_weight(placed, quantization)
            except ValueError as error:
                raise ModelError(f"Medusa heads are of no use: {error}") from error
            return forms.pack([form], None if bias is None else bias.to(device, dtype), dtype)

        heads = weights.heads
        self.num_heads = len(heads)
        self.calibration = weights.calibration
        self._layers = [
            [pack(head.layers[depth].weight, head.layers[depth].bias) for head in heads]
            for depth in range(1, weights.num_layers)
        ]
        self._first = None
        if weights.num_layers:
            # All heads read the same hidden state: their first layers are one matrix.
            self._first = pack(*stacked([head.layers[0] for head in heads]))
        outputs = {id(head.output): head.output for head in heads}  # one may be everybody's
        self._own = [pack(output) for output in outputs.values() if output is not None]
        self._outputs = self._own
        if not self._own:
            assert shared_output is not None
            self._outputs = [shared_output]
        self._soft_cap = 0.0 if self._own else soft_cap
        self._token_map = None if weights.token_map is None else weights.token_map.to(device)

    @property
    def nbytes(self) -> int:
        """Bytes held; an output head shared with the model is not counted."""
        layers = [weight for depth in self._layers for weight in depth]
        first = [] if self._first is None else [self._first]
        return sum(weight.nbytes for weight in [*first, *layers, *self._own])

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores by head; hidden [n, hidden] -> [n, heads, rows of the outputs]."""
        count, size = hidden.shape
        x = hidden[:, None].expand(count, self.num_heads, size)
        if self._first is not None:
            x = residual(x, ops.linear(hidden, self._first).view(count, self.num_heads, size))
        for depth in self._layers:
            projected = [ops.linear(x[:, i].contiguous(), w) for i, w in enumerate(depth)]
            x = residual(x, torch.stack(projected, dim=1))
        if len(self._outputs) == 1:
            flat = x.reshape(count * self.num_heads, size)
            scores = ops.linear(flat, self._outputs[0])
            scores = ops.soft_cap(scores, self._soft_cap) if self._soft_cap else scores
            return scores.view(count, self.num_heads, -1)
        by_head = [ops.linear(x[:, i].contiguous(), w) for i, w in enumerate(self._outputs)]
        return torch.stack(by_head, dim=1)

    def guesses(self, hidden: Tensor, ranks: int) -> Guesses:
        """What each head holds likeliest; hidden [n, hidden] in the model's dtype.

        As many of them as `ranks`, or as the outputs have rows.
        """
        scores = self.logits(hidden).float()
        top, token_ids = likeliest(scores, min(ranks, scores.shape[-1]))
        probabilities = (top - scores.logsumexp(-1, keepdim=True)).exp()
        if self._token_map is not None:
            token_ids = self._token_map[token_ids]
        return Guesses(token_ids, probabilities)


def likeliest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest scores of each row and their places, as `torch.topk` over the last dim.

    On a CPU the highest are looked for where they must be: in the groups that have the highest
    maxima, as many as are wanted. That passes over the scores once, which sorting does not.
    """
    size = scores.shape[-1]
    groups, rest = divmod(size, _GROUP)
    if scores.is_cuda or rest or groups < _LEAST_GROUPS * count:
        top, places = scores.topk(count, dim=-1)
        return top, places
    grouped = scores.reshape(-1, groups, _GROUP)
    best = grouped.amax(-1).topk(count, dim=-1, sorted=False).indices
    inner = grouped.gather(1, best[..., None].expand(-1, -1, _GROUP)).flatten(1)
    top, within = inner.topk(count, dim=-1)
    places = best.gather(1, within // _GROUP) * _GROUP + within % _GROUP
    shape = (*scores.shape[:-1], count)
    return top.view(shape), places.view(shape)


def stacked(layers: Sequence[ResidualLayer]) -> tuple[Tensor, Tensor | None]:
    """Layers that read the same input as one: weight [layers * hidden, hidden] and its bias.

    Where some have a bias, those without have zeros.
    """
    weight = torch.cat([layer.weight for layer in layers])
    if all(layer.bias is None for layer in layers):
        return weight, None
    zeros = torch.zeros_like(layers[0].weight[0])
    return weight, torch.cat([zeros if layer.bias is None else layer.bias for layer in layers])
