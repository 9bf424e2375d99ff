"""What trials at some points would measure, as far as simulation and measured trials tell.

A sample of a quantity is the simulated value, times what a draw of the costs makes of it, times
what measured trials say that the simulation is off by. Samples of several points are drawn jointly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autotune.records import TrialRecord
from autotune.search.acquisition import Sampled
from autotune.search.discrepancy import ALIKE_KNOBS, CLASS_KNOBS, Discrepancy
from autotune.search.forecast import (
    OBJECTIVE,
    Forecast,
    Forecaster,
    falls_with_slowness,
    limit_name,
    load_limits,
    quantities,
    worth_of,
)
from autotune.search.objective import Objective
from autotune.search.space import SearchSpace
from autotune.simulation.interval import Interval
from autotune.slo import Slo
from autotune.slo_grammar import Limit
from engine.config import EngineConfig

SAMPLES = 256
# What a trial measures beyond any doubt of the model is still off by this factor's logarithm.
LEAST_NOISE = 0.02
FAILURES = ("crash", "out_of_memory", "timeout")
# The chance that weights that were not scored yet keep the limits on the quality.
UNSCORED_QUALITY = 0.7

Floats = NDArray[np.float64]
Point = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Question:
    """What a search asks of its forecasts."""

    space: SearchSpace
    base: EngineConfig
    slo: Slo
    objective: Objective
    seed: int

    def worth(self, values: Mapping[str, float]) -> float:
        """The objective's logarithm, more being better, less what the limits are missed by."""
        return worth_of(values, self.slo, self.objective)


class Beliefs:
    """Joint samples over points, given the trials so far.

    Args:
        question: what is asked.
        forecaster: simulates.
        records: search trials.
        num_draws: draws of the costs for each class of weights, cache and drafts.
    """

    def __init__(
        self,
        question: Question,
        forecaster: Forecaster,
        records: Sequence[TrialRecord],
        num_draws: int,
    ) -> None:
        self._question = question
        self._forecaster = forecaster
        self._records = records
        self._num_draws = num_draws
        self._offsets: dict[tuple[Any, ...], list[Mapping[str, float]]] = {}
        points: list[Point] = []
        measured: list[Mapping[str, float]] = []
        simulated: list[Mapping[str, float]] = []
        for record in records:
            point = self.point_of(record)
            if record.metrics is None or record.outcome != "ok" or point is None:
                continue
            expected = forecaster.simulate(self._config(point))
            if expected is not None:
                points.append(point)
                simulated.append(expected)
                measured.append(quantities(record.metrics, question.slo, question.objective))
        self.discrepancy = Discrepancy(question.space, points, log_residuals(measured, simulated))

    def point_of(self, record: TrialRecord) -> Point | None:
        """The point of the space at which a trial ran."""
        space, base = self._question.space, self._question.base
        return space.point_of(EngineConfig.from_mapping({**base.to_dict(), **record.config}))

    def worths(self, points: Sequence[Point]) -> list[float | None]:
        """The worth of each point by what is likeliest; None where it cannot be simulated."""
        names = [OBJECTIVE, *(limit_name(limit) for limit in load_limits(self._question.slo))]
        factors = {name: np.exp(self.discrepancy.means(name, points)) for name in names}
        worths: list[float | None] = []
        for row, point in enumerate(points):
            simulated = self._forecaster.simulate(self._config(point))
            if simulated is None:
                worths.append(None)
                continue
            values = {n: simulated[n] * float(factors[n][row]) for n in names if n in simulated}
            worths.append(self._question.worth(values))
        return worths

    def sampled(self, points: Sequence[Point]) -> Sampled:
        """Samples of what decides; every point must be one that can be simulated."""
        question = self._question
        slower = self._slower(points)
        chances = np.random.default_rng([question.seed, len(self._records), 2])
        noise = chances.standard_normal((len(points), SAMPLES))
        value = self._samples(OBJECTIVE, points, slower, None)
        value = np.where(np.isnan(value), -np.inf, value if question.objective.maximise else -value)
        missed = np.zeros_like(value)
        for limit in load_limits(question.slo):
            samples = self._samples(limit_name(limit), points, slower, noise)
            missed += missed_by(limit, samples)
        met = (missed <= 0.0) & self._runs(points) & self._keeps_quality(points)
        return Sampled(value, met, missed)

    def forecast(self, point: Point, elsewhere: Forecaster | None = None) -> Forecast | None:
        """What a trial at a point would measure, with the noise of a single trial.

        `elsewhere` simulates it under another load than that of the trials so far.
        """
        forecaster = elsewhere or self._forecaster
        simulated = forecaster.simulate(self._config(point))
        if simulated is None:
            return None
        question = self._question
        slower = self._slower([point])
        chances = np.random.default_rng([question.seed, len(self._records), 3])
        noise = chances.standard_normal((1, SAMPLES))
        missed = np.zeros(SAMPLES)
        for limit in load_limits(question.slo):
            samples = self._samples(limit_name(limit), [point], slower, noise, forecaster)
            missed += missed_by(limit, samples)[0]
        intervals = {}
        for name in simulated:
            samples = self._samples(name, [point], slower, noise, forecaster)[0]
            samples = samples[np.isfinite(samples)]
            if len(samples):
                intervals[name] = Interval.of(float(np.median(samples)), list(samples))
        objective = intervals.pop(OBJECTIVE, None)
        metrics = {n: i for n, i in intervals.items() if not n.startswith("limit ")}
        return Forecast(metrics, objective, float((missed <= 0).mean()))

    def _config(self, point: Point) -> EngineConfig:
        return self._question.space.config_of(point, self._question.base)

    def _slower(self, points: Sequence[Point]) -> Floats:
        """Of each point and sample, how much slower than expected, in standard deviations."""
        chances = np.random.default_rng([self._question.seed, len(self._records), 1])
        root = self.discrepancy.root(points)
        return np.asarray(root @ chances.standard_normal((len(points), SAMPLES)))

    def _samples(
        self,
        name: str,
        points: Sequence[Point],
        slower: Floats,
        noise: Floats | None,
        forecaster: Forecaster | None = None,
    ) -> Floats:
        """Samples of a quantity, (points, samples); infinite where it was not even simulated."""
        question = self._question
        sign = -1.0 if falls_with_slowness(name, question.slo, question.objective) else 1.0
        scale = self.discrepancy.scale(name)
        off = sign * scale * slower
        if noise is not None:
            off = off + max(LEAST_NOISE, scale * math.sqrt(self.discrepancy.noise)) * noise
        off = off + self.discrepancy.means(name, points)[:, None]
        rows = np.full((len(points), SAMPLES), np.nan)
        for row, point in enumerate(points):
            simulated = (forecaster or self._forecaster).simulate(self._config(point))
            value = None if simulated is None else simulated.get(name)
            if value is None:
                continue
            if value <= 0:
                rows[row] = value
                continue
            offsets = np.array([o.get(name, 0.0) for o in self._offsets_at(point)] or [0.0])
            drawn = offsets[np.arange(SAMPLES) % len(offsets)]
            rows[row] = value * np.exp(off[row] + drawn)
        return rows

    def _offsets_at(self, point: Point) -> list[Mapping[str, float]]:
        """Logarithms of drawn over likeliest quantities; a class's points share those of one.

        What drafts are worth is the less certain the more of them there are.
        """
        key = tuple(point.get(name) for name in (*ALIKE_KNOBS, "num_speculative_tokens"))
        if key not in self._offsets:
            config = self._config(point)
            middle = self._forecaster.simulate(config) or {}
            self._offsets[key] = [
                {
                    name: math.log(value / middle[name])
                    for name, value in drawn.items()
                    if value > 0 and middle.get(name, 0.0) > 0
                }
                for drawn in self._forecaster.draws(config, self._num_draws)
            ]
        return self._offsets[key]

    def _runs(self, points: Sequence[Point]) -> NDArray[np.bool_]:
        """Whether trials do not fail, (points, samples), by how those with the weights fared."""
        met = np.ones((len(points), SAMPLES), dtype=bool)
        for row, point in enumerate(points):
            method = self._method(point)
            alike = [r.outcome for r in self._records if r.config.get("quantization") == method]
            failed = sum(outcome in FAILURES for outcome in alike)
            if failed:
                chance = (len(alike) - failed + 1) / (len(alike) + 1)
                met[row] = self._luck(f"runs {method}").random(SAMPLES) < chance
        return met

    def _method(self, point: Point) -> str:
        return str(point.get("quantization", self._question.base.quantization))

    def _luck(self, what: str) -> np.random.Generator:
        """Chance that is the same for all points that share a cause."""
        return np.random.default_rng([self._question.seed, *what.encode()])

    def _keeps_quality(self, points: Sequence[Point]) -> NDArray[np.bool_]:
        """Whether the limits on the quality are met, (points, samples); one chance a variant."""
        met = np.ones((len(points), SAMPLES), dtype=bool)
        if not self._question.slo.needs_quality:
            return met
        base = self._question.base.to_dict()
        known = {
            tuple(r.config[n] for n in CLASS_KNOBS): r.outcome != "quality"
            for r in self._records
            if r.quality is not None
        }
        for row, point in enumerate(points):
            variant = tuple(point.get(name, base[name]) for name in CLASS_KNOBS)
            if variant in known:
                met[row] = known[variant]
            elif variant != ("none", "auto"):
                luck = self._luck(f"quality {self._method(point)}")
                met[row] = luck.random(SAMPLES) < UNSCORED_QUALITY
        return met


def log_residuals(
    measured: Sequence[Mapping[str, float]], simulated: Sequence[Mapping[str, float]]
) -> dict[str, list[float]]:
    """Logarithms of measured over simulated by quantity; NaN where one of them is not above 0."""
    names = dict.fromkeys(name for values in simulated for name in values)

    def log(name: str, seen: Mapping[str, float], said: Mapping[str, float]) -> float:
        both = seen.get(name, 0.0), said.get(name, 0.0)
        return math.log(both[0] / both[1]) if min(both) > 0 else math.nan

    pairs = list(zip(measured, simulated, strict=True))
    return {name: [log(name, seen, said) for seen, said in pairs] for name in names}


def missed_by(limit: Limit, samples: Floats) -> Floats:
    """By how much samples miss a limit, at least 0; what was not simulated is a miss of it.

    TPOT and ITL of single tokens are met without a measurement.
    """
    upper = limit.operator in ("<", "<=")
    over = samples - limit.bound if upper else limit.bound - samples
    over = over / limit.bound if limit.bound else over
    # A bound that is only just reached is missed where it is strict, which no sample decides.
    unmeasured = 0.0 if limit.metric in ("tpot", "itl") else 10.0
    return np.asarray(np.where(np.isnan(samples), unmeasured, np.maximum(over, 0.0)))
