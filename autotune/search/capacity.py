"""The highest rate at which a configuration still meets the SLO, by bracketing and bisection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from autotune.search.messages import Answer, BrokeGuard, CutShort, Failed
from autotune.slo import Slo

# First steps away from the starting rate; then the bracket is halved on a logarithmic scale.
BRACKET_STEP = 1.6


@dataclass(frozen=True, slots=True)
class Capacity:
    """The outcome of a capacity search.

    `metrics` are those of the load at `factor`, the highest rate factor that met the SLO; if none
    did, `factor` is 0 and they are those of the lowest rate that was tried.
    """

    factor: float
    metrics: dict[str, Any]


def find_capacity(
    measure_at: Callable[[float], Answer],
    slo: Slo,
    start: float,
    probes: int,
    keep: Callable[[], None] = lambda: None,
) -> Capacity | BrokeGuard | CutShort | Failed:
    """Find the highest rate factor that meets the SLO with a fixed number of loads.

    From `start` the rate is raised or lowered by `BRACKET_STEP` until the outcome changes, then the
    bracket is bisected geometrically. The error left is the bracket's width. `keep` is called after
    each load whose metrics are, so far, those of the outcome.
    """
    passed: tuple[float, dict[str, Any]] | None = None
    failed: tuple[float, dict[str, Any]] | None = None
    factor = start
    for _ in range(probes):
        reply = measure_at(factor)
        if isinstance(reply, (BrokeGuard, CutShort, Failed)):
            return reply
        met = all(r.met for r in slo.evaluate(reply.metrics)) and reply.metrics["load_delivered"]
        if met:
            passed = (factor, reply.metrics)
        else:
            failed = (factor, reply.metrics)
        if met or not passed:
            keep()
        if passed and failed:
            factor = (passed[0] * failed[0]) ** 0.5
        else:
            factor = factor * BRACKET_STEP if met else factor / BRACKET_STEP
    if passed:
        return Capacity(*passed)
    assert failed is not None
    return Capacity(0.0, failed[1])
