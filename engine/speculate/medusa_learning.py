"""Medusa heads that learn: the frozen model's states in, cross entropy of later tokens out.

Medusa-1 of Cai et al. 2024, section 2.2.1: a head's residual blocks begin at zero, so that it
guesses what the model's output head says; with an output of its own, that too begins as the
model's. Heads share nothing that learns, so each has its own loss and none needs a weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.models.decoder import Decoder
from engine.speculate.medusa_heads import HeadWeights, MedusaWeights, ResidualLayer, residual
from kernels import ops
from kernels.slow_dtypes import multiplies_slowly


class LearningHeads:
    """Parameters in float32, computed in the model's dtype, or in float32 where that is faster.

    Args:
        decoder: the frozen model, whole.
        num_heads, num_layers: of them, and residual blocks of each.
        own_output: whether each head gets an output projection of its own that learns.
    """

    def __init__(
        self, decoder: Decoder, num_heads: int, num_layers: int, *, own_output: bool = False
    ) -> None:
        hidden, device = decoder.spec.hidden_size, decoder.device
        self._kept = decoder.dtype
        output = ops.dequantize(decoder.head).to(decoder.dtype)
        self._output = output.float() if multiplies_slowly(output) else output
        self._dtype = self._output.dtype
        self._cap = 0.0 if own_output else decoder.spec.logit_soft_cap
        # [heads, ...]: heads alike are computed at once.
        size = (num_heads, hidden, hidden)
        self.weights = [torch.zeros(size, device=device) for _ in range(num_layers)]
        self.biases = [torch.zeros(size[:2], device=device) for _ in range(num_layers)]
        self.outputs = [output.float().repeat(num_heads, 1, 1)] if own_output else []
        self.num_heads = num_heads
        for parameter in self.parameters():
            parameter.requires_grad_()

    def parameters(self) -> list[Tensor]:
        """All that learns."""
        return [*self.weights, *self.biases, *self.outputs]

    def logits(self, states: Tensor) -> Tensor:
        """Scores by head; states [n, hidden] in the model's dtype -> [heads, n, vocabulary]."""
        x = states.to(self._dtype).expand(self.num_heads, *states.shape)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            weight, bias = weight.to(self._dtype), bias.to(self._dtype)
            x = residual(x, torch.baddbmm(bias[:, None], x, weight.transpose(1, 2)))
        if self.outputs:
            return x @ self.outputs[0].to(self._dtype).transpose(1, 2)
        scores = F.linear(x, self._output)
        return self._cap * torch.tanh(scores / self._cap) if self._cap else scores

    def losses(self, states: Tensor, targets: Tensor, missing: int) -> Tensor:
        """Mean cross entropy of each head in nats, [heads]; 0 for one that has no target.

        targets: int64 [n, heads], `missing` where there is none.
        """
        scores = self.logits(states).float()
        nats = F.cross_entropy(
            scores.flatten(0, 1), targets.t().flatten(), ignore_index=missing, reduction="none"
        )
        known = (targets != missing).sum(0)
        return nats.view(self.num_heads, -1).sum(1) / known.clamp(min=1)

    def snapshot(self, calibration: tuple[tuple[float, ...], ...] = ()) -> MedusaWeights:
        """The heads as they are now, in the model's dtype and on the CPU."""

        def kept(tensor: Tensor) -> Tensor:
            return tensor.detach().to("cpu", self._kept, copy=True)

        heads = [
            HeadWeights(
                tuple(
                    ResidualLayer(kept(weight[head]), kept(bias[head]))
                    for weight, bias in zip(self.weights, self.biases, strict=True)
                ),
                kept(self.outputs[0][head]) if self.outputs else None,
            )
            for head in range(self.num_heads)
        ]
        return MedusaWeights(tuple(heads), calibration=calibration)
