"""What a trial is expected to measure before it runs, as it stands beside what it measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from autotune.search.objective import Objective
from autotune.simulation.interval import Interval
from autotune.slo import QUALITY_METRICS, Slo
from autotune.slo_grammar import LATENCIES, Limit
from engine.config import EngineConfig

OBJECTIVE = "objective"
STATISTICS = ("mean", "p50", "p95", "p99")
RATES = (
    "output_tokens_per_s",
    "requests_per_s",
    "goodput_requests_per_s",
    "goodput_tokens_per_s",
    "slo_attainment",
)


@dataclass(frozen=True, slots=True)
class Forecast:
    """A trial's expected metrics by name (`ttft.p95`, `output_tokens_per_s`), its objective, and
    the probability that it meets the limits of the SLO that a load measures."""

    metrics: Mapping[str, Interval]
    objective: Interval | None
    p_meets_slo: float

    def to_json(self) -> dict[str, Any]:
        """Plain values, as a trial's record keeps them under `predicted`."""
        return {
            "metrics": {name: interval.to_json() for name, interval in self.metrics.items()},
            "objective": None if self.objective is None else self.objective.to_json(),
            "p_meets_slo": self.p_meets_slo,
        }


@dataclass(frozen=True, slots=True)
class Choice:
    """A point that is worth a trial, why, and what it is expected to measure, if that is known."""

    source: str
    point: Mapping[str, Any]
    forecast: Forecast | None


class Forecaster(Protocol):
    """Says what trials would measure, and learns from those that were."""

    def simulate(self, config: EngineConfig) -> Mapping[str, float] | None:
        """`quantities` of a trial as far as they are likeliest; None where nothing is known."""
        ...

    def draws(self, config: EngineConfig, count: int) -> Sequence[Mapping[str, float]]:
        """`quantities` of a trial under costs drawn from what may be so.

        What one config's draw has too slow, another's of the same place has as well.
        """
        ...


def load_limits(slo: Slo) -> list[Limit]:
    """The limits of an SLO that a load measures; the others are on the quality."""
    return [limit for limit in slo.limits if limit.metric not in QUALITY_METRICS]


def limit_name(limit: Limit) -> str:
    """The name under which `quantities` has what a limit bounds."""
    return f"limit {limit.text}"


def quantities(metrics: Mapping[str, Any], slo: Slo, objective: Objective) -> dict[str, float]:
    """What of a measurement is predicted, by name: objective, what limits bound, and metrics.

    What was not measured is left out.
    """
    values: dict[str, float | None] = {OBJECTIVE: objective.value(metrics, slo)}
    texts = {limit.text: limit for limit in load_limits(slo)}
    for result in slo.evaluate(metrics):
        if result.limit in texts:
            values[limit_name(texts[result.limit])] = result.measured
    for metric in LATENCIES:
        known = metrics.get(metric) or {}
        values |= {f"{metric}.{statistic}": known.get(statistic) for statistic in STATISTICS}
    values |= {name: metrics.get(name) for name in RATES}
    return {name: float(value) for name, value in values.items() if value is not None}


def falls_with_slowness(name: str, slo: Slo, objective: Objective) -> bool:
    """Whether a quantity is smaller where steps take longer."""
    if name == OBJECTIVE:
        return objective.maximise
    limits = {limit_name(limit): limit for limit in slo.limits}
    if name in limits:
        return limits[name].operator in (">", ">=")
    return name in RATES


def worth_of(values: Mapping[str, float], slo: Slo, objective: Objective) -> float:
    """The objective's logarithm, more being better, less what the limits are missed by.

    `values` are `quantities`.
    """
    value = values.get(OBJECTIVE)
    if value is None:
        return -math.inf
    sign = 1.0 if objective.maximise else -1.0
    worth = sign * math.log(max(value, 1e-12))
    for limit in load_limits(slo):
        measured = values.get(limit_name(limit))
        if measured is None and limit.metric not in ("tpot", "itl"):
            worth -= 10.0
        elif measured is not None and not limit.met_by(measured):
            worth -= 4.0 * math.log1p(max(0.0, limit.violation(measured)))
    return worth
