"""Which trials to run next: what simulation promises, corrected by what trials measured.

The quantities of a trial are the simulated ones times what a Gaussian process says of measured over
simulated (`autotune.search.discrepancy`), so that knobs of which no simulation knows are learned
from the trials alone. Points are compared by their worth: the objective's logarithm, less what
limits are missed by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from autotune.external_search.space import FlagConfig, FlagSpace, point_key
from autotune.records import TrialRecord
from autotune.search.acquisition import Reached, Sampled, choose
from autotune.search.beliefs import log_residuals
from autotune.search.discrepancy import Discrepancy
from autotune.search.forecast import (
    OBJECTIVE,
    Choice,
    Forecast,
    falls_with_slowness,
    limit_name,
    load_limits,
    quantities,
    worth_of,
)
from autotune.search.objective import Objective
from autotune.simulation.interval import Interval
from autotune.slo import Slo

MOST_CONSIDERED = 512
# Of the simulated points, so many are compared by all that is known; and the neighbours of as many
# measured ones as `LEADERS`.
SHORTLIST = 24
LEADERS = 2
SAMPLES = 256
# A configuration that failed is taken for worse than the worst that ran, by this factor.
_FAILED = 2.0
# Worths that differ by less are equal to a simulation; then the fewest changes come first.
_EQUAL = 0.01
_WORTH = "worth"
# Where nothing finished there is no worth; further down a single trial would decide the scale.
_LEAST_WORTH = -40.0

Point = Mapping[str, Any]
Simulate = Callable[[FlagConfig], Mapping[str, float] | None]


class Chooser:
    """Suggests points; what it says follows from the trials alone.

    Args:
        space: where to look.
        base: the default.
        slo: what is promised.
        objective: what is compared.
        seed: of what is drawn.
        simulate: `quantities` of a trial; None where it cannot be told.
    """

    def __init__(
        self,
        space: FlagSpace,
        base: FlagConfig,
        slo: Slo,
        objective: Objective,
        seed: int,
        simulate: Simulate,
    ) -> None:
        self._space, self._base = space, base
        self._slo, self._objective = slo, objective
        self._seed = seed
        self._simulate = simulate
        self._considered = space.candidates(base, MOST_CONSIDERED, seed)

    @property
    def considered(self) -> int:
        """How many points were simulated."""
        return len(self._considered)

    def choose(
        self, records: Sequence[TrialRecord], excluded: Callable[[Point], bool]
    ) -> Choice | None:
        """The point that is worth most to measure next; None if none is left."""
        known = self._measured(records)
        correction = self._correction(known)
        points = self._shortlist(known, excluded)
        if not points:
            return None
        everywhere = [*points, *(point for point, _ in known)]
        means = np.array([self._worth(p) for p in everywhere])
        means = means + correction.means(_WORTH, everywhere)
        rng = np.random.default_rng([self._seed, len(records)])
        drawn = correction.root(everywhere) @ rng.standard_normal((len(everywhere), SAMPLES))
        value = means[:, None] + correction.scale(_WORTH) * drawn
        sampled = Sampled(value, np.ones(value.shape, dtype=bool), np.zeros(value.shape))
        reached = Reached.by(sampled.rows(range(len(points), len(everywhere))), 1.0)
        best = choose(sampled.rows(range(len(points))), reached, 1)[0][0]
        return Choice("forecast", points[best], self.forecast(records, points[best]))

    def forecast(self, records: Sequence[TrialRecord], point: Point) -> Forecast | None:
        """What a trial at a point is expected to measure, with the noise of a single trial."""
        simulated = self._simulate(self._space.config_of(point, self._base))
        known = [(p, r) for r in records if r.outcome == "ok" and (p := self._point(r)) is not None]
        if simulated is None or not known:
            return None
        measured = [quantities(r.metrics or {}, self._slo, self._objective) for _, r in known]
        expected = [self._simulate(self._space.config_of(p, self._base)) or {} for p, _ in known]
        correction = Discrepancy(
            self._space, [p for p, _ in known], log_residuals(measured, expected)
        )
        spread = math.sqrt(float((correction.root([point]) ** 2).sum()) + correction.noise)
        draws = np.random.default_rng([self._seed, len(records), 1]).standard_normal(SAMPLES)
        intervals: dict[str, Interval] = {}
        met = np.ones(SAMPLES, dtype=bool)
        limits = {limit_name(limit): limit for limit in load_limits(self._slo)}
        for name, value in simulated.items():
            sign = -1.0 if falls_with_slowness(name, self._slo, self._objective) else 1.0
            middle = value * math.exp(float(correction.means(name, [point])[0]))
            samples = middle * np.exp(sign * correction.scale(name) * spread * draws)
            if name in limits:
                met &= np.array([limits[name].met_by(float(s)) for s in samples])
            else:
                intervals[name] = Interval.of(middle, [float(s) for s in samples])
        objective = intervals.pop(OBJECTIVE, None)
        return Forecast(intervals, objective, float(met.mean()))

    def _measured(self, records: Sequence[TrialRecord]) -> list[tuple[Point, float]]:
        """Points that were tried, with what they were worth; failures are worth little."""
        found: list[tuple[Point, float | None]] = []
        for record in records:
            point = self._point(record)
            if point is not None and record.outcome != "rejected":
                found.append((point, self._worth_of_trial(record)))
        ran = [worth for _, worth in found if worth is not None]
        worst = min(ran, default=0.0) - math.log(_FAILED)
        return [(point, worst if worth is None else worth) for point, worth in found]

    def _worth_of_trial(self, record: TrialRecord) -> float | None:
        if record.metrics is None or record.outcome not in ("ok", "cut_short"):
            return None
        if record.outcome == "cut_short":
            # As far behind in a full load as in the short one.
            told = record.metrics.get("short_load") or {}
            return None if "expected_worth" not in told else float(told["expected_worth"])
        return self._floored(quantities(record.metrics, self._slo, self._objective))

    def _correction(self, known: Sequence[tuple[Point, float]]) -> Discrepancy:
        residuals = [worth - self._worth(point) for point, worth in known]
        return Discrepancy(self._space, [point for point, _ in known], {_WORTH: residuals})

    def _shortlist(
        self, known: Sequence[tuple[Point, float]], excluded: Callable[[Point], bool]
    ) -> list[Point]:
        start = self._space.point_in({}, self._base) or {}

        def order(point: Point) -> tuple[float, int]:
            changes = sum(point[name] != start.get(name) for name in point)
            return -round(self._worth(point) / _EQUAL), changes

        best = sorted(self._considered, key=order)
        leaders = [point for point, _ in sorted(known, key=lambda item: -item[1])[:LEADERS]]
        near = [p for leader in leaders for p in self._space.neighbours(leader, self._base)]
        unique = {point_key(p): p for p in near if not excluded(p)}
        kept = [p for p in best if not excluded(p)][:SHORTLIST]
        return list({**{point_key(p): p for p in kept}, **unique}.values())

    def _worth(self, point: Point) -> float:
        """By simulation; that of the default where nothing is known, so that trials tell all."""
        values = self._simulate(self._space.config_of(point, self._base))
        if values is None:
            values = self._simulate(self._base)
        return 0.0 if values is None else self._floored(values)

    def _floored(self, values: Mapping[str, float]) -> float:
        return max(_LEAST_WORTH, worth_of(values, self._slo, self._objective))

    def _point(self, record: TrialRecord) -> Point | None:
        return self._space.point_in(record.config, self._base)
