"""A mixture of experts: each token goes through the few that its router picks.

Shazeer et al. 2017, "Outrageously Large Neural Networks"; Fedus et al. 2022, "Switch Transformers".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.models.spec import DecoderSpec
from kernels import ops
from kernels.ops import DenseWeight, LinearWeight


@dataclass(frozen=True, slots=True)
class Experts:
    """Weights of a router [experts, hidden] and of each expert's gated MLP."""

    router: DenseWeight
    gate_up: tuple[LinearWeight, ...]
    down: tuple[LinearWeight, ...]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        experts = sum(weight.nbytes for weight in self.gate_up + self.down)
        return self.router.nbytes + experts


def run_experts(
    spec: DecoderSpec,
    experts: Experts,
    x: Tensor,
    observe: Callable[[str, Tensor], None] | None = None,
) -> Tensor:
    """Weighted sum of the chosen experts' outputs; x [T, hidden] -> [T, hidden].

    Each expert takes its tokens together. A token's sum runs over its choices in order, in float32,
    so that it does not depend on which other tokens there are.
    """
    assert spec.experts is not None
    top_k = spec.experts.top_k
    weights, chosen = ops.route(ops.linear(x, experts.router), top_k, spec.experts.normalize)
    flat = chosen.flatten()
    # Pairs of token and choice, sorted by expert.
    pairs = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=spec.experts.num_experts).tolist()
    rows = x.index_select(0, pairs // top_k)
    outputs: list[Tensor] = []
    start = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        part = rows.narrow(0, start, count)
        if observe is not None:
            observe(f"experts.{expert}.gate_up", part)
        part = ops.linear(part, experts.gate_up[expert])
        part = gated(spec, part)
        if observe is not None:
            observe(f"experts.{expert}.down", part)
        outputs.append(ops.linear(part, experts.down[expert]))
        start += count
    by_choice = torch.empty_like(rows)
    by_choice[pairs] = torch.cat(outputs)
    by_choice = by_choice.view(x.shape[0], top_k, -1)
    total = by_choice[:, 0].float() * weights[:, 0, None]
    for choice in range(1, top_k):
        total += by_choice[:, choice].float() * weights[:, choice, None]
    return total.to(x.dtype)


def gated(spec: DecoderSpec, x: Tensor) -> Tensor:
    """The gate's activation times the other half; x [T, 2 I] -> [T, I]."""
    return ops.silu_and_mul(x) if spec.activation == "silu" else ops.gelu_and_mul(x, "tanh")
