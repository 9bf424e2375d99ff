"""How much traffic one replica carries within the SLO, by arithmetic, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from autotune.planning.arithmetic import Replicas, Steady
from autotune.planning.candidates import Candidate
from autotune.planning.planned_traffic import LengthSample
from autotune.planning.step_table import StepTables, StepWorks
from autotune.planning.trial import Trial
from autotune.predict.cost_model import CostDraw, CostModel
from autotune.simulation.interval import Interval
from autotune.slo import Slo
from engine.block_groups import BlockGroup

# How far, as a standard deviation of the logarithm, arithmetic alone may be off.
ARITHMETIC_SPREAD = 0.25
_MOST_REPLICAS = 100_000
# By how much other batch limits than the usual must carry more to be preferred.
_MARKED = 1.03
# Choices whose draws are judged at once, as far as memory goes.
_AT_ONCE = 64


@dataclass(slots=True)
class Estimate:
    """What is known of one candidate, from arithmetic first and corrected by simulation.

    - `replica`: the one row of arithmetic at the likeliest cost, `capacity` its requests per second
      within the SLO.
    - `drawn`: the same at each drawn cost, of the rows `drawn_replicas`.
    - `correction`: how many times as much simulation finds; `spread` how far that may be off, as a
      standard deviation of its logarithm.
    """

    candidate: Candidate
    model: CostModel
    replica: Replicas
    capacity: float
    drawn: tuple[float, ...] = ()
    drawn_replicas: Replicas | None = None
    correction: float = 1.0
    spread: float = ARITHMETIC_SPREAD
    trials: list[Trial] = field(default_factory=list)

    @property
    def simulated(self) -> bool:
        """Whether simulation corrected it."""
        return bool(self.trials)

    @property
    def seats(self) -> float:
        """Most sequences at once in one replica."""
        return float(self.replica.seats[0])

    def at(self, rate: float) -> Steady:
        """The steady state of one replica at a rate, by arithmetic."""
        return self.replica.at(np.array([rate]))

    def capacities(self) -> Interval:
        """Requests per second of one replica within the SLO."""
        value = self.capacity * self.correction
        known = np.array(self.drawn or (self.capacity,)) * self.correction
        noise = np.exp(self.spread * np.random.default_rng(7).standard_normal((64, len(known))))
        return Interval.of(value, (known * noise).ravel().tolist())

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


class Arithmetic:
    """Arithmetic of many candidates at once, under one traffic.

    Args:
        sample: the traffic's lengths.
        slo: limits that are judged.
        rate: of the whole traffic, which tells among how many replicas arrivals are shared.
        burstiness: squared coefficient of variation of the gaps between all arrivals.
    """

    def __init__(self, sample: LengthSample, slo: Slo, rate: float, burstiness: float) -> None:
        self.sample = sample
        self.slo = slo
        self.rate = rate
        self.burstiness = burstiness
        self._works: dict[tuple[int, tuple[BlockGroup, ...]], StepWorks] = {}

    def replicas(self, rows: Sequence[tuple[Candidate, CostDraw]]) -> Replicas:
        """A row for each candidate at a cost."""
        works = [self._works_of(candidate) for candidate, _ in rows]
        tables = [work.table(cost.cost) for work, (_, cost) in zip(works, rows, strict=True)]
        seats = np.array([max(1.0, candidate.seats(self.sample)) for candidate, _ in rows])
        return Replicas(
            StepTables.stack(tables, works), self.sample, seats, np.full(len(rows), self.burstiness)
        )

    def estimates(
        self, choices: Sequence[Sequence[Candidate]], models: Sequence[CostModel]
    ) -> list[Estimate]:
        """Of each choice, under its batch limits, the candidate that carries most."""
        rows = [
            (index, candidate, model)
            for index, (limits, model) in enumerate(zip(choices, models, strict=True))
            for candidate in limits
        ]
        if not rows:
            return []
        replicas = self.replicas([(c, model.middle(c.config)) for _, c, model in rows])
        capacity = replicas.capacity(self.slo.limits)
        # Taking turns makes arrivals more even, the more replicas there are.
        parts = np.maximum(1.0, np.round(self.rate / np.maximum(capacity, 1e-9)))
        replicas = replicas.with_variation(self.burstiness / np.where(capacity > 0, parts, 1.0))
        capacity = np.where(capacity > 0, replicas.capacity(self.slo.limits), 0.0)
        best: dict[int, int] = {}
        for row, (index, _, _) in enumerate(rows):
            if index not in best or capacity[row] > capacity[best[index]] * _MARKED:
                best[index] = row
        return [
            Estimate(rows[row][1], rows[row][2], replicas.only(row), float(capacity[row]))
            for _, row in sorted(best.items())
        ]

    def draw(self, known: Sequence[Estimate], count: int, seed: int) -> None:
        """Fill in the capacity of each at each of `count` drawn costs."""
        for start in range(0, len(known), _AT_ONCE):
            some = known[start : start + _AT_ONCE]
            rows = [
                (e.candidate, cost)
                for e in some
                for cost in e.model.draws(e.candidate.config, count, seed)
            ]
            variation = np.repeat([float(e.replica.variation[0]) for e in some], count)
            replicas = self.replicas(rows).with_variation(variation)
            capacity = replicas.capacity(self.slo.limits).reshape(len(some), count)
            for place, estimate in enumerate(some):
                estimate.drawn = tuple(capacity[place].tolist())
                estimate.drawn_replicas = replicas.between(place * count, (place + 1) * count)

    def _works_of(self, candidate: Candidate) -> StepWorks:
        assert candidate.cache is not None
        tokens, groups = candidate.config.max_num_batched_tokens, candidate.cache.groups
        if (tokens, groups) not in self._works:
            self._works[tokens, groups] = StepWorks(tokens, groups, self.sample)
        return self._works[tokens, groups]


def _normal(x: float) -> float:
    """The standard normal distribution."""
    return 0.5 * math.erfc(-x / math.sqrt(2))
