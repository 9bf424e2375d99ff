"""Simulation of one replica, to correct what arithmetic says of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from autotune.planning.arithmetic import HOPELESS
from autotune.planning.estimate import Estimate
from autotune.planning.planned_traffic import PlannedTraffic
from autotune.planning.trial import Stage, Trial
from autotune.predict.cost_model import CostDraw
from autotune.slo import Slo

# Simulations of a search for the capacity, its longest step as a logarithm of the rate, and a
# violation that is near enough to none.
SEARCHES = 3
_STEP = math.log(1.25)
_NEAR = 0.15
# How far a capacity differs from one stretch of traffic to another, as a standard deviation of its
# logarithm.
_CHANCE = 0.05


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
        self.slo = slo
        self.rate = rate
        self.draws = draws
        self.seed = seed
        self._traffic = traffic

    def correct(self, known: Estimate) -> None:
        """Find the capacity of one replica by simulation near it, and correct the arithmetic by it.

        A replica that is simulated at a rate and misses the SLO by so much carries as much less as
        arithmetic says for that miss.
        """
        middle = known.model.middle(known.candidate.config)
        low: tuple[float, float] | None = None
        high: tuple[float, float] | None = None
        at = math.log(0.97 * known.capacity)
        width = _STEP
        for _ in range(SEARCHES):
            trial = self._trial(known, middle, math.exp(at), draw=0)
            known.trials.append(trial)
            point = (at, trial.violation)
            if trial.violation > 0:
                high = point if high is None or at < high[0] else high
            else:
                low = point if low is None or at > low[0] else low
            if abs(trial.violation) < _NEAR:
                width = 0.0
                break
            at = self._next(known, low, high)
            width = high[0] - low[0] if low and high else abs(at - point[0])
        known.correction = math.exp(at) / known.capacity
        known.spread = math.hypot(_CHANCE, min(_STEP, width) / 4)

    def confirm(self, known: Estimate, replicas: int, count: int) -> list[Trial]:
        """Simulate the load of one of so many replicas at some of the drawn costs.

        They are chosen to stand for all: by the capacity at each, from low to high. Each has
        arrivals of its own.
        """
        costs = known.model.draws(known.candidate.config, self.draws, self.seed)
        order = sorted(range(len(costs)), key=lambda k: known.drawn[k])
        chosen = [order[int((i + 0.5) * len(order) / count)] for i in range(count)]
        return [
            self._trial(known, costs[k], self.rate / replicas, draw=1 + i, parts=replicas)
            for i, k in enumerate(chosen)
        ]

    def work(self, known: Estimate) -> float:
        """About what one simulation of a candidate takes, in requests with few others beside."""
        expected = known.at(0.97 * known.capacity)
        if expected.saturated[0]:
            return 0.0
        requests = self._stage(known).requests(expected, known.capacity)
        return requests * (1 + float(expected.batch[0]) / 100)

    def _trial(
        self, known: Estimate, cost: CostDraw, rate: float, *, draw: int, parts: int | None = None
    ) -> Trial:
        if parts is None:
            parts = max(1, round(self.rate / known.capacity))
        expected = known.at(min(rate, 0.97 * known.capacity))
        return self._stage(known).run(cost, rate, parts, expected, draw)

    def _stage(self, known: Estimate) -> Stage:
        candidate = known.candidate
        assert candidate.cache is not None
        return Stage(
            candidate.config, candidate.cache, self._traffic, known.replica.sample, self.slo
        )

    def _next(
        self,
        known: Estimate,
        low: tuple[float, float] | None,
        high: tuple[float, float] | None,
    ) -> float:
        """The logarithm of the rate at which the SLO should just be met."""
        if low and high:
            below, above = max(low[1], -0.7), min(high[1], 0.7)
            return low[0] - (high[0] - low[0]) * below / (above - below)
        point = low or high
        assert point is not None
        if point[1] >= HOPELESS:
            return point[0] - _STEP
        # The rate at which arithmetic has the same violation.
        rates = known.capacity * np.exp(np.linspace(-0.7, 0.5, 61))
        violations = known.replica.repeated(len(rates)).violation(rates, self.slo.limits)
        alike = float(np.interp(point[1], np.maximum.accumulate(violations), np.log(rates)))
        moved = math.log(known.capacity) - alike
        return point[0] + min(_STEP, max(-_STEP, moved))


def blended(known: Estimate, rate: float, replicas: int, trials: Sequence[Trial]) -> float:
    """The chance of meeting the SLO: what was simulated, beside as much weight of the estimate."""
    prior = known.chance(rate, replicas)
    if not trials:
        return prior
    met = sum(trial.violation <= 0 for trial in trials)
    return (prior * len(trials) + met) / (2 * len(trials))
