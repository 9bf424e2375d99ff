"""What a search maximises or minimises, computed from the metrics of one measurement."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from autotune.errors import BadInput
from autotune.slo import Slo

ObjectiveName = Literal["goodput", "throughput", "capacity", "latency", "cost"]
OBJECTIVES: tuple[ObjectiveName, ...] = ("goodput", "throughput", "capacity", "latency", "cost")


@dataclass(frozen=True, slots=True)
class Objective:
    """One number to compare configurations by; `price` is USD per hour of this machine.

    - goodput: requests per second that met every limit of the SLO;
    - throughput: output tokens per second;
    - capacity: highest offered rate, in requests per second, at which the SLO is met;
    - latency: the largest measured/bound ratio over the SLO's latency limits, or the p95 of E2E in
      seconds when the SLO has none;
    - cost: USD per million output tokens of requests that met every limit.
    """

    name: ObjectiveName
    price: float | None = None

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVES:
            raise BadInput(f"objective {self.name!r} is not one of {', '.join(OBJECTIVES)}")
        if self.name == "cost" and self.price is None:
            raise BadInput(
                "objective cost needs the machine's price: add --price USD_PER_HOUR, "
                "for instance --price 1.20"
            )
        if self.price is not None and not 0 < self.price < math.inf:
            raise BadInput(f"--price {self.price} must be above 0 (USD per hour of this machine)")

    @property
    def maximise(self) -> bool:
        """Whether more is better."""
        return self.name not in ("latency", "cost")

    @property
    def direction(self) -> Literal["maximize", "minimize"]:
        """Optuna's word for it."""
        return "maximize" if self.maximise else "minimize"

    def unit(self, slo: Slo) -> str:
        """Unit of `value`."""
        if self.name == "latency":
            return "of the limit" if _latency_limits(slo) else "s"
        return {
            "goodput": "requests/s",
            "throughput": "tokens/s",
            "capacity": "requests/s",
            "cost": "USD/M tokens",
        }[self.name]

    def value(self, metrics: Mapping[str, Any], slo: Slo) -> float | None:
        """The objective of one measurement; None when nothing was measured to compute it from."""
        if self.name == "goodput":
            return float(metrics["goodput_requests_per_s"])
        if self.name == "throughput":
            return float(metrics["output_tokens_per_s"])
        if self.name == "capacity":
            return float(metrics["capacity_requests_per_s"])
        if self.name == "cost":
            tokens = float(metrics["goodput_tokens_per_s"])
            assert self.price is not None
            return self.price / (tokens * 3600) * 1e6 if tokens > 0 else None
        limits = _latency_limits(slo)
        if not limits:
            p95 = metrics["e2e"]["p95"]
            return None if p95 is None else float(p95)
        results = [r for r in slo.evaluate(metrics) if r.limit in limits]
        # A limit that is met without a measurement, as TPOT of single tokens, says nothing.
        if any(r.measured is None and not r.met for r in results):
            return None
        return max((r.measured / r.bound for r in results if r.measured is not None), default=None)


def _latency_limits(slo: Slo) -> set[str]:
    return {limit.text for limit in slo.limits if limit.metric in ("ttft", "tpot", "itl", "e2e")}
