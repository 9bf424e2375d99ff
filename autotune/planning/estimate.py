"""How much traffic one replica carries within the SLO: by arithmetic, then by simulation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from autotune.metrics import STATISTICS
from autotune.planning.arithmetic import Replica
from autotune.planning.candidates import Candidate
from autotune.planning.planned_traffic import LengthSample, PlannedTraffic
from autotune.planning.trial import Stage, Trial
from autotune.predict.cost_model import CostDraw, CostModel
from autotune.simulation.interval import Interval
from autotune.slo import Slo, statistic_of
from engine.config import EngineConfig

# How far, as a standard deviation of the logarithm, arithmetic alone may be off; and how far a
# capacity is known that was simulated on one stretch of traffic.
ARITHMETIC_SPREAD = 0.25
_LEAST_SPREAD = 0.03
# Simulations of a search for the capacity, its first step, and when it is near enough.
_SEARCHES = 4
_STEP = math.log(1.25)
_NEAR = 0.06
_MOST_REPLICAS = 100_000


@dataclass(slots=True)
class Estimate:
    """What is known of one candidate, from arithmetic first and corrected by simulation.

    - `capacity`: requests per second of one replica at the likeliest cost, by arithmetic.
    - `drawn`: the same at each drawn cost, of `drawn_replicas`.
    - `correction`: how many times as much simulation finds; `spread` how far that may be off, as a
      standard deviation of its logarithm.
    """

    candidate: Candidate
    model: CostModel
    replica: Replica
    capacity: float
    drawn: tuple[float, ...] = ()
    drawn_replicas: tuple[Replica, ...] = ()
    correction: float = 1.0
    spread: float = ARITHMETIC_SPREAD
    trials: list[Trial] = field(default_factory=list)

    @property
    def simulated(self) -> bool:
        """Whether simulation corrected it."""
        return bool(self.trials)

    def capacities(self) -> Interval:
        """Requests per second of one replica within the SLO."""
        value = self.capacity * self.correction
        known = [c for c in (self.drawn or (self.capacity,))]
        rng = np.random.default_rng(7)
        noise = np.exp(self.spread * rng.standard_normal((64, len(known))))
        return Interval.of(value, (np.array(known) * self.correction * noise).ravel())

    def chance(self, rate: float, replicas: int) -> float:
        """The chance that so many replicas carry a rate within the SLO."""
        drawn = self.drawn or (self.capacity,)
        chances = [
            _normal(math.log(c * self.correction * replicas / rate) / self.spread) if c > 0 else 0.0
            for c in drawn
        ]
        return sum(chances) / len(chances)

    def replicas(self, rate: float, probability: float) -> int | None:
        """The fewest replicas that carry a rate with a probability; None if none do."""
        if self.chance(rate, _MOST_REPLICAS) < probability:
            return None
        low, high = 1, 1
        while self.chance(rate, high) < probability:
            low, high = high + 1, high * 2
        while low < high:
            middle = (low + high) // 2
            if self.chance(rate, middle) < probability:
                low = middle + 1
            else:
                high = middle
        return low

    def sustained(self, replicas: int, probability: float) -> float:
        """The highest rate that so many replicas carry with a probability."""
        one = self.capacity * self.correction
        if one <= 0 or replicas < 1:
            return 0.0
        low, high = math.log(one / 50), math.log(one * 5)
        if self.chance(math.exp(low), 1) < probability:
            return 0.0
        for _ in range(30):
            middle = (low + high) / 2
            if self.chance(math.exp(middle), 1) < probability:
                high = middle
            else:
                low = middle
        return math.exp(low) * replicas


def estimate(
    options: Sequence[Candidate],
    model: CostModel,
    sample: LengthSample,
    slo: Slo,
    rate: float,
    burstiness: float,
) -> Estimate:
    """The candidate of one choice that carries most, by arithmetic.

    Args:
        options: the choice under its batch limits; all fit.
        model: the cost of steps.
        sample: the traffic's lengths.
        slo: limits that arithmetic judges.
        rate: of the whole traffic, which tells among how many replicas arrivals are shared.
        burstiness: squared coefficient of variation of the gaps between all arrivals.
    """
    best: Estimate | None = None
    for candidate in options:
        table = candidate.table(model.middle(candidate.config), sample)
        replica = candidate.replica(table, sample, burstiness)
        capacity = replica.capacity(slo.limits)
        if capacity > 0:
            # Taking turns makes arrivals more even, the more replicas there are.
            parts = max(1, round(rate / capacity))
            if parts > 1:
                replica = candidate.replica(table, sample, burstiness / parts)
                capacity = replica.capacity(slo.limits)
        if best is None or capacity > best.capacity:
            best = Estimate(candidate, model, replica, capacity)
    assert best is not None
    return best


def draw_costs(known: Estimate, count: int, seed: int, slo: Slo) -> None:
    """Fill in the capacity at each of `count` drawn costs."""
    candidate, replica = known.candidate, known.replica
    tables = [
        candidate.table(cost, replica.sample)
        for cost in known.model.draws(candidate.config, count, seed)
    ]
    known.drawn_replicas = tuple(dataclasses.replace(replica, table=table) for table in tables)
    known.drawn = tuple(drawn.capacity(slo.limits) for drawn in known.drawn_replicas)


class Simulator:
    """Simulates replicas of candidates under one traffic.

    Args:
        traffic: cut to the longest sequence.
        slo: limits that simulation judges.
        rate: that all replicas carry together.
        draws: guesses at the cost.
        seed: of the guesses.
    """

    def __init__(
        self, traffic: PlannedTraffic, slo: Slo, rate: float, draws: int, seed: int
    ) -> None:
        self.traffic = traffic
        self.slo = slo
        self.rate = rate
        self.draws = draws
        self.seed = seed
        self.requests = 0

    def correct(self, known: Estimate) -> None:
        """Search for the capacity of one replica by simulation, and correct the arithmetic by it."""
        middle = known.model.middle(known.candidate.config)
        points: list[tuple[float, float]] = []
        low: tuple[float, float] | None = None
        high: tuple[float, float] | None = None
        at = math.log(known.capacity)
        for _ in range(_SEARCHES):
            trial = self.trial(known, middle, math.exp(at), draw=0)
            known.trials.append(trial)
            point = (at, min(0.7, max(-0.7, trial.violation)))
            points.append(point)
            if trial.violation > 0:
                high = point if high is None or at < high[0] else high
            else:
                low = point if low is None or at > low[0] else low
            if low and high and high[0] - low[0] < _NEAR:
                break
            at = _next(low, high)
        found = math.exp(_root(low, high))
        # A second stretch of traffic tells how much hangs on chance.
        again = self.trial(known, middle, found, draw=1)
        known.trials.append(again)
        slope = _slope(low, high)
        chance = min(0.3, abs(again.violation) / slope / math.sqrt(2))
        known.correction = found * math.exp(
            -min(0.2, max(-0.2, again.violation / slope / 2))
        ) / known.capacity
        known.spread = math.hypot(_LEAST_SPREAD, chance)

    def confirm(self, known: Estimate, replicas: int, count: int) -> list[Trial]:
        """Simulate the load of one of so many replicas at some of the drawn costs.

        They are chosen to stand for all: by the capacity at each, from low to high. Each has
        arrivals of its own.
        """
        config = known.candidate.config
        costs = known.model.draws(config, self.draws, self.seed)
        order = sorted(range(len(costs)), key=lambda k: known.drawn[k])
        chosen = [order[int((i + 0.5) * len(order) / count)] for i in range(count)]
        return [
            self.trial(known, costs[k], self.rate / replicas, draw=2 + i, parts=replicas)
            for i, k in enumerate(chosen)
        ]

    def trial(
        self,
        known: Estimate,
        cost: CostDraw,
        rate: float,
        *,
        draw: int,
        parts: int | None = None,
    ) -> Trial:
        """One replica at a rate."""
        candidate = known.candidate
        assert candidate.cache is not None
        if parts is None:
            parts = max(1, round(self.rate / known.capacity))
        stage = Stage(
            candidate.config, candidate.cache, self.traffic, known.replica.sample, self.slo
        )
        expected = known.replica.at(min(rate, 0.98 * known.capacity))
        trial = stage.run(cost, rate, parts, expected, draw)
        self.requests += trial.simulated
        return trial

    def cost_of(self, known: Estimate) -> float:
        """About what simulating a candidate takes, in requests with a few others in the batch."""
        expected = known.replica.at(0.98 * known.capacity)
        if expected.saturated:
            return 0.0
        candidate = known.candidate
        assert candidate.cache is not None
        stage = Stage(
            candidate.config, candidate.cache, self.traffic, known.replica.sample, self.slo
        )
        return stage.requests(expected, known.capacity) * (1 + expected.batch / 100)


def arithmetic_intervals(known: Estimate, rate: float) -> dict[str, Any] | None:
    """Latency statistics of a replica at a rate, by arithmetic; None where requests pile up.

    Its rates are those of the simulation as far as this corrected them.
    """
    corrected = rate / known.correction
    middle = known.replica.at(corrected)
    others = [replica.at(corrected) for replica in known.drawn_replicas]
    others = [state for state in others if not state.saturated]
    if middle.saturated:
        return None
    told: dict[str, Any] = {}
    for metric in ("ttft", "tpot", "e2e"):
        values = getattr(middle, metric)
        told[metric] = {}
        for name in STATISTICS:
            value = statistic_of(values, name)
            drawn = [statistic_of(getattr(state, metric), name) for state in others]
            assert value is not None
            known_draws = [d for d in drawn if d is not None]
            told[metric][name] = Interval.of(value, [*known_draws, value]).to_json()
    # The gaps between tokens differ more than their means; arithmetic tells the mean alone.
    told["itl"] = {"mean": told["tpot"]["mean"]}
    return told


def metric_intervals(middle: Trial, trials: Sequence[Trial]) -> dict[str, Any] | None:
    """Latency statistics as intervals, by the keys of `bench`; None where requests piled up."""
    found = [t.metrics for t in trials if t.metrics is not None]
    if middle.metrics is None or not found:
        return None
    told: dict[str, Any] = {}
    for metric in ("ttft", "tpot", "itl", "e2e"):
        told[metric] = {}
        for name, value in middle.metrics[metric].items():
            if not isinstance(value, float):
                continue
            drawn = [m[metric][name] for m in found if m[metric].get(name) is not None]
            told[metric][name] = Interval.of(value, [*drawn, value]).to_json()
    return told


def blended(known: Estimate, rate: float, replicas: int, trials: Sequence[Trial]) -> float:
    """The chance of meeting the SLO: what was simulated, beside as much weight of the estimate."""
    met = sum(trial.violation <= 0 for trial in trials)
    prior = known.chance(rate, replicas)
    return (prior * len(trials) + met) / (2 * len(trials)) if trials else prior


def planning_config(config: EngineConfig) -> dict[str, Any]:
    """The knobs that a plan chose."""
    return {
        name: getattr(config, name)
        for name in (
            "tensor_parallel_size",
            "quantization",
            "kv_cache_dtype",
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_model_len",
        )
    }


def _next(low: tuple[float, float] | None, high: tuple[float, float] | None) -> float:
    if low is None:
        assert high is not None
        return high[0] - _STEP * (1.6 if high[1] >= 0.7 else 1.0)
    if high is None:
        return low[0] + _STEP * (1.6 if low[1] <= -0.7 else 1.0)
    # Between the straight line's root and the middle: violations rise steeply at the end.
    weight = low[1] / (low[1] - high[1])
    weight = min(0.85, max(0.15, (weight + 0.5) / 2))
    return low[0] + weight * (high[0] - low[0])


def _root(low: tuple[float, float] | None, high: tuple[float, float] | None) -> float:
    if low is None:
        assert high is not None
        return high[0] - _STEP
    if high is None:
        return low[0]
    return low[0] + (high[0] - low[0]) * low[1] / (low[1] - high[1] - 1e-9)


def _slope(low: tuple[float, float] | None, high: tuple[float, float] | None) -> float:
    """By how much the violation rises with the logarithm of the rate; at least a little."""
    if low is None or high is None or high[0] <= low[0]:
        return 2.0
    return max(0.5, (high[1] - low[1]) / (high[0] - low[0]))


def _normal(x: float) -> float:
    """The standard normal distribution."""
    return 0.5 * math.erfc(-x / math.sqrt(2))

