"""A mixture of experts: each token goes through the few that its router picks.

Shazeer et al. 2017, "Outrageously Large Neural Networks"; Fedus et al. 2022, "Switch Transformers".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engine.models.spec import DecoderSpec
from kernels import ops
from kernels.ops import DenseWeight, LinearWeight, StackedWeight


@dataclass(frozen=True, slots=True)
class Experts:
    """Weights of a router [experts, hidden] and of each expert's gated MLP.

    `stacked` are those of all experts side by side, gate and up, then down, where the device has
    kernels for them; `gate_up` and `down` are views of it then.
    """

    router: DenseWeight
    gate_up: tuple[LinearWeight, ...]
    down: tuple[LinearWeight, ...]
    stacked: tuple[StackedWeight, StackedWeight] | None = None

    @classmethod
    def of(cls, router: DenseWeight, pairs: Sequence[tuple[LinearWeight, LinearWeight]]) -> Experts:
        """Of each expert's gate and up, and down; side by side where there are kernels for them."""
        gate_up, down = zip(*pairs, strict=True)
        stacked = ops.pack_experts(gate_up), ops.pack_experts(down)
        if stacked[0] is None or stacked[1] is None:
            return cls(router, gate_up, down)
        views = [[part.expert(i) for i in range(len(pairs))] for part in stacked if part]
        return cls(router, tuple(views[0]), tuple(views[1]), (stacked[0], stacked[1]))

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

    Each expert takes its tokens together; where weights are stacked, without asking the device how
    many there are, so that a step can be captured. A token's sum runs over its choices in order, in
    float32, so that it does not depend on which other tokens there are.
    """
    assert spec.experts is not None
    top_k = spec.experts.top_k
    weights, chosen = ops.route(ops.linear(x, experts.router), top_k, spec.experts.normalize)
    if experts.stacked is not None and observe is None:
        total = ops.run_stacked(x, *experts.stacked, weights, chosen, partial(gated, spec))
        if total is not None:
            return total
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
