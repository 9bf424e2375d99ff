"""What keeps a replica from carrying more: which figure of the GPU, were it better, helps most."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autotune.hardware.catalogue import Gpu, Link
from autotune.planning.estimate import Arithmetic, Estimate
from autotune.predict.cost_model import CostModel
from autotune.slo_grammar import Limit

# By how much a figure is made better in thought, and the least gain that counts as binding.
BETTER = 1.1
_LEAST_GAIN = 0.015
NAMES = {
    "compute": "matrix units",
    "bandwidth": "memory bandwidth",
    "kv_cache": "memory for the KV cache",
    "link": "the link between the GPUs",
}


@dataclass(frozen=True, slots=True)
class Binding:
    """The figure that binds, by its name in the JSON; what 10% more of each would gain, as a share.

    `limit` is the limit of the SLO that is missed first when the rate rises; None if requests pile
    up before any is.
    """

    constraint: str
    gains: dict[str, float]
    limit: str | None

    @property
    def text(self) -> str:
        """One sentence for a person."""
        end = f"{self.limit} is missed first" if self.limit else "requests pile up first"
        if self.constraint in NAMES:
            gain = self.gains[self.constraint]
            return f"{end}; 10% more of {NAMES[self.constraint]} would carry {gain:.0%} more"
        if self.constraint == "latency":
            return f"{end}; fixed times of kernels and of the host weigh most"
        return f"{end}; prompts and answers in the queue weigh most"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"text": self.text, "limit": self.limit, "gains": dict(self.gains)}


def find_bindings(
    known: Sequence[Estimate],
    limits: Sequence[Limit],
    arithmetic: Arithmetic,
    model_of: Callable[[Gpu], CostModel],
) -> list[Binding]:
    """Make each figure of each GPU better by 10% in turn, and see what a replica carries then.

    `model_of` gives the cost on a GPU by its figures.
    """
    if not known:
        return []
    rows, names = [], []
    for estimate in known:
        candidate = estimate.candidate
        for name, gpu in _variants(candidate.choice.gpu).items():
            rows.append((candidate, model_of(gpu).middle(candidate.config)))
            names.append(name)
    count = len(rows) // len(known)
    seats = [estimate.seats for estimate in known for _ in range(count)]
    more = [_more_seats(estimate) for estimate in known]
    variation = np.repeat([float(estimate.replica.variation[0]) for estimate in known], count)
    replicas = (
        arithmetic.replicas(rows)
        .with_variation(variation)
        .with_seats(
            np.array(
                [
                    more[place // count] if name == "kv_cache" else seat
                    for place, (name, seat) in enumerate(zip(names, seats, strict=True))
                ]
            )
        )
    )
    capacities = replicas.capacity(limits).reshape(len(known), count)
    found = []
    for place, estimate in enumerate(known):
        told = dict(zip(names[:count], capacities[place].tolist(), strict=True))
        # Against the data sheet's own, whatever the cost was made of.
        usual = told.pop("")
        gains = {name: value / usual - 1 if usual > 0 else 0.0 for name, value in told.items()}
        if estimate.candidate.choice.ranks == 1:
            gains.pop("link")
        limit = estimate.replica.missed_first(np.array([estimate.capacity * 1.02]), limits)[0]
        found.append(_binding(gains, limit))
    return found


def _binding(gains: dict[str, float], limit: Limit | None) -> Binding:
    best = max(gains, key=lambda name: gains[name])
    if gains[best] >= _LEAST_GAIN:
        constraint = best
    else:
        constraint = "latency" if limit is not None and limit.metric != "ttft" else "queue"
    return Binding(constraint, gains, None if limit is None else limit.text)


def _more_seats(known: Estimate) -> float:
    """Seats with a tenth more memory: the cache grows by that, and not the weights."""
    memory, footprint = known.candidate.memory, known.replica.sample.mean_footprint
    per_token = max(1.0, memory.parts["kv_cache"] / max(1, memory.kv_tokens))
    more = (BETTER - 1) * memory.total / per_token / footprint
    return max(known.seats, min(memory.kv_tokens / footprint + more, 4 * known.seats))


def _variants(gpu: Gpu) -> dict[str, Gpu]:
    rates = {name: rate * BETTER for name, rate in gpu.rates.items()}

    def faster(link: Link) -> Link:
        return dataclasses.replace(link, bytes_per_s=link.bytes_per_s * BETTER)

    return {
        "": gpu,
        "kv_cache": gpu,
        "compute": dataclasses.replace(gpu, rates=rates),
        "bandwidth": dataclasses.replace(gpu, bandwidth=gpu.bandwidth * BETTER),
        "link": dataclasses.replace(gpu, link=faster(gpu.link), host_link=faster(gpu.host_link)),
    }
