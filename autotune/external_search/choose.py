"""Which trials to run next: what simulation promises, corrected by what trials measured.

The quantities of a trial are the simulated ones times what a Gaussian process says of measured over
simulated (`autotune.search.discrepancy`), so that knobs of which no simulation knows are learned
from the trials alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autotune.external_search.space import FlagConfig, FlagSpace, point_key
from autotune.records import TrialRecord
from autotune.search.acquisition import Reached, Sampled, choose
from autotune.search.beliefs import log_residuals, missed_by
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

MOST_CONSIDERED = 128
# Of the simulated points, so many are compared by all that is known; and the neighbours of as many
# measured ones as `LEADERS`.
SHORTLIST = 24
LEADERS = 2
SAMPLES = 256
# Worths that differ by less are equal to a simulation; then the fewest changes come first.
_EQUAL = 0.01
_FAILS = "fails"
# Where nothing finished there is no worth.
_LEAST_WORTH = -40.0

Point = Mapping[str, Any]
Floats = NDArray[np.float64]
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
        played: the knobs whose effect a simulation shows; the others are moved one at a time, from
            the best that ran.
    """

    def __init__(
        self,
        space: FlagSpace,
        base: FlagConfig,
        slo: Slo,
        objective: Objective,
        seed: int,
        simulate: Simulate,
        played: Sequence[str] = (),
    ) -> None:
        self._space, self._base = space, base
        self._slo, self._objective = slo, objective
        self._seed = seed
        self._simulate = simulate
        self._played = frozenset(played)
        self._considered = space.candidates(
            base, MOST_CONSIDERED, seed, played or list(space.values)
        )

    def choose(
        self, records: Sequence[TrialRecord], excluded: Callable[[Point], bool]
    ) -> Choice | None:
        """The point that is worth most to measure next; None if none is left."""
        tried = _Tried.of(self, records)
        points = self._shortlist(tried, excluded)
        if not points:
            return None
        everywhere = [*points, *tried.points]
        sampled = self._sampled(tried, everywhere, len(records))
        # What ran met the limits or not as it was measured, whatever the samples say.
        met = [len(points) + i for i, r in enumerate(tried.records) if r.slo_met]
        missed = [r.missed for r in tried.records if r.outcome == "ok"]
        reached = Reached.by(sampled.rows(met), max(1e-3, min(missed, default=1.0)))
        best = choose(sampled.rows(range(len(points))), reached, 1)[0][0]
        return Choice("forecast", points[best], self.forecast(records, points[best]))

    def forecast(self, records: Sequence[TrialRecord], point: Point) -> Forecast | None:
        """What a trial at a point is expected to measure, with the noise of a single trial."""
        simulated = self._simulate(self._space.config_of(point, self._base))
        tried = _Tried.of(self, [r for r in records if r.outcome == "ok"])
        if simulated is None or not tried.points:
            return None
        correction = tried.off
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

    def _sampled(self, tried: _Tried, points: Sequence[Point], seed: int) -> Sampled:
        """Joint samples of the objective and of what the limits are missed by."""
        rng = np.random.default_rng([self._seed, seed])
        slower = tried.off.root(points) @ rng.standard_normal((len(points), SAMPLES))
        rows = [self.simulated(point) for point in points]

        def samples(name: str) -> Floats:
            """By the simulation, or from 1 on where nothing is simulated."""
            said = np.array(
                [(values or {}).get(name, math.nan if values else 1.0) for values in rows]
            )
            falls = falls_with_slowness(name, self._slo, self._objective)
            off = tried.off.means(name, points)[:, None]
            drawn = (-1.0 if falls else 1.0) * tried.off.scale(name) * slower
            return np.asarray(said[:, None] * np.exp(off + drawn))

        value = samples(OBJECTIVE)
        value = np.where(np.isnan(value), -np.inf, value if self._objective.maximise else -value)
        short = np.zeros_like(value)
        for limit in load_limits(self._slo):
            short += missed_by(limit, samples(limit_name(limit)))
        fails = tried.fails.means(_FAILS, points)[:, None]
        met = (short <= 0.0) & (rng.random(value.shape) >= fails)
        return Sampled(value, met, short)

    def simulated(self, point: Point) -> Mapping[str, float] | None:
        """`quantities` by simulation; those of the default where a point cannot be played."""
        values = self._simulate(self._space.config_of(point, self._base))
        return self._simulate(self._base) if values is None else values

    def measured(self, record: TrialRecord) -> Mapping[str, float]:
        """`quantities` of a trial; of one that was cut short, those of its short load."""
        return quantities(record.metrics or {}, self._slo, self._objective)

    def point_of(self, record: TrialRecord) -> Point | None:
        """Where a trial ran."""
        return self._space.point_in(record.config, self._base)

    @property
    def space(self) -> FlagSpace:
        """Where to look."""
        return self._space

    def _shortlist(self, tried: _Tried, excluded: Callable[[Point], bool]) -> list[Point]:
        start = self._space.point_in({}, self._base) or {}

        def order(point: Point) -> tuple[float, int]:
            changes = sum(point[name] != start.get(name) for name in point)
            return -round(self._worth(self.simulated(point)) / _EQUAL), changes

        best: list[Point] = sorted(self._considered, key=order)
        ran = zip(tried.points, tried.records, strict=True)
        worths = [(self._worth(self.measured(r)), p) for p, r in ran if r.outcome == "ok"]
        leaders = [p for _, p in sorted(worths, key=lambda item: -item[0])[:LEADERS]]
        best = [point for point in best if not excluded(point)]
        telling = [point for point in best if not self._told(point, tried)][:SHORTLIST]
        telling += [p for p in self._near(leaders, excluded) if not self._told(p, tried)]
        if not telling:
            telling = best[:SHORTLIST] or self._near(tried.points, excluded)
        return list({point_key(point): point for point in telling}.values())

    def _near(self, points: Sequence[Point], excluded: Callable[[Point], bool]) -> list[Point]:
        """The neighbours of points."""
        near = (other for point in points for other in self._space.neighbours(point, self._base))
        return [other for other in near if not excluded(other)]

    def _told(self, point: Point, tried: _Tried) -> bool:
        """Whether a trial tells what this point would come to: to a simulation they are one.

        That is so where they differ in what it plays alone, and it sees no difference.
        """
        worth = self._worth(self.simulated(point))
        return any(
            all(point[name] == value for name, value in other.items() if name not in self._played)
            and abs(self._worth(self.simulated(other)) - worth) < _EQUAL
            for other in tried.points
        )

    def _worth(self, values: Mapping[str, float] | None) -> float:
        if values is None:
            return 0.0
        return max(_LEAST_WORTH, worth_of(values, self._slo, self._objective))


@dataclass(frozen=True, slots=True)
class _Tried:
    """Where trials ran, what they say of the simulation, and where they failed."""

    points: list[Point]
    records: list[TrialRecord]
    off: Discrepancy
    fails: Discrepancy

    @classmethod
    def of(cls, chooser: Chooser, records: Sequence[TrialRecord]) -> _Tried:
        pairs = [
            (point, record)
            for record in records
            if record.outcome != "rejected" and (point := chooser.point_of(record)) is not None
        ]
        ran = [(p, r) for p, r in pairs if r.metrics is not None]
        measured = [chooser.measured(r) for _, r in ran]
        simulated = [
            chooser.simulated(p) or dict.fromkeys(m, 1.0)
            for (p, _), m in zip(ran, measured, strict=True)
        ]
        off = Discrepancy(chooser.space, [p for p, _ in ran], log_residuals(measured, simulated))
        failed = [0.0 if r.metrics is not None else 1.0 for _, r in pairs]
        fails = Discrepancy(chooser.space, [p for p, _ in pairs], {_FAILS: failed})
        return cls([p for p, _ in pairs], [r for _, r in pairs], off, fails)
