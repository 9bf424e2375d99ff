"""What keeps a replica from carrying more: which of the GPU's figures, were it better, helps most."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from autotune.hardware.catalogue import Gpu
from autotune.planning.estimate import Estimate
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


def find_binding(
    known: Estimate, limits: Sequence[Limit], model_of: Callable[[Gpu], CostModel] | None
) -> Binding:
    """Make each figure of the GPU better by 10% in turn, and see what the replica carries then.

    `model_of` gives the cost on a GPU; None where the cost was measured and not made of a GPU's
    figures: only the memory is then varied.
    """
    gains = {"kv_cache": _gain(known, _more_seats(known, limits))}
    if model_of is not None:
        for name, gpu in _better(known.candidate.choice.gpu).items():
            if name == "link" and known.candidate.choice.ranks == 1:
                continue
            model = model_of(gpu)
            table = known.candidate.table(model.middle(known.candidate.config), known.replica.sample)
            replica = dataclasses.replace(known.replica, table=table)
            gains[name] = _gain(known, replica.capacity(limits))
    best = max(gains, key=lambda name: gains[name])
    limit = known.replica.missed_first(known.capacity * 1.02, limits)
    if gains[best] >= _LEAST_GAIN:
        constraint = best
    else:
        constraint = "latency" if limit is not None and limit.metric != "ttft" else "queue"
    return Binding(constraint, gains, None if limit is None else limit.text)


def _more_seats(known: Estimate, limits: Sequence[Limit]) -> float:
    """The capacity with a tenth more memory: the cache grows by that and not the weights."""
    memory = known.candidate.memory
    held = memory.kv_tokens / known.replica.sample.mean_footprint
    per_token = max(1.0, memory.parts["kv_cache"] / max(1, memory.kv_tokens))
    more = (BETTER - 1) * memory.total / per_token / known.replica.sample.mean_footprint
    seats = max(known.replica.seats, min(held + more, 4 * known.replica.seats))
    return dataclasses.replace(known.replica, seats=seats).capacity(limits)


def _better(gpu: Gpu) -> dict[str, Gpu]:
    rates = {name: rate * BETTER for name, rate in gpu.rates.items()}

    def faster(link: Any) -> Any:
        return dataclasses.replace(link, bytes_per_s=link.bytes_per_s * BETTER)

    return {
        "compute": dataclasses.replace(gpu, rates=rates),
        "bandwidth": dataclasses.replace(gpu, bandwidth=gpu.bandwidth * BETTER),
        "link": dataclasses.replace(gpu, link=faster(gpu.link), host_link=faster(gpu.host_link)),
    }


def _gain(known: Estimate, capacity: float) -> float:
    gain = capacity / known.capacity - 1 if known.capacity > 0 else 0.0
    return gain if math.isfinite(gain) else 0.0
