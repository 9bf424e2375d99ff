"""Chooses trials by forecast: screens the space, believes, chooses, and learns from what ran.

All that it does follows from the trials on disk, so that a resumed run chooses as the uninterrupted
one would have.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autotune.predict.apply import NotPredictable
from autotune.predict.cost_model import CostModel
from autotune.predict.drafting import check_drafts
from autotune.records import TrialRecord
from autotune.search.acquisition import Reached, choose
from autotune.search.beliefs import Beliefs, Question
from autotune.search.candidates import Demand, fastest_methods, neighbours, rough_worth
from autotune.search.discrepancy import ALIKE_KNOBS, CLASS_KNOBS
from autotune.search.forecast import Choice, Forecast
from autotune.search.rough_drafts import RoughDrafts
from autotune.search.screening import Screened, screen
from autotune.search.simulated_trials import SimulatedTrials
from engine.errors import EngineError

# Points that are sampled together, and measured ones among them.
SHORTLIST = 40
INCUMBENTS = 12
# From the best so many, one knob is moved at a time at each choice.
STARTS = 2

Point = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Effort:
    """How many simulations: of the screening, of points after a refit, of draws a class.

    The screening ends after `most_s` seconds, whatever is left of it.
    """

    screened: int
    refreshed: int
    draws: int
    most_s: float

    @classmethod
    def of(cls, simulations: float, most_s: float) -> Effort:
        """A share of what can be afforded in all; at least what makes any sense."""
        return cls(
            screened=max(24, int(0.4 * simulations)),
            refreshed=min(SHORTLIST, max(10, int(0.08 * simulations))),
            draws=min(8, max(3, int(simulations / 60))),
            most_s=most_s,
        )


class Guide:
    """Suggests points to measure.

    Args:
        question: what the search asks.
        fit: makes forecasts from the trials so far, of trials under a window of the workload.
        demand: what the load asks for.
        effort: how much may be simulated.
    """

    def __init__(
        self,
        question: Question,
        fit: Callable[[Sequence[TrialRecord], int], SimulatedTrials],
        demand: Demand,
        effort: Effort,
    ) -> None:
        self._question = question
        self._fit = fit
        self._demand = demand
        self._effort = effort
        self._rough_drafts = RoughDrafts()
        self._fitted: dict[tuple[int, int], SimulatedTrials] = {}
        self._screened: dict[tuple[str, ...], Screened] = {}
        self._beliefs: tuple[int, Beliefs] | None = None

    @property
    def simulations(self) -> int:
        """Trials that were simulated so far."""
        return sum(fitted.simulations for fitted in self._fitted.values())

    def screened(self, records: Sequence[TrialRecord]) -> Screened:
        """What came of the space, by what the first trials told."""
        methods = self._methods(records)
        key = tuple(methods)
        if key not in self._screened:
            forecaster = self._forecaster(records[: self._first(records)])
            self._screened[key] = screen(
                self._question.space,
                self._question.base,
                methods,
                lambda point: self._rough(forecaster.model, point),
                lambda point: self._simulated(forecaster, point),
                self._effort.screened,
                self._question.seed,
                until=time.monotonic() + self._effort.most_s,
            )
        return self._screened[key]

    def choose(
        self,
        records: Sequence[TrialRecord],
        count: int,
        excluded: Callable[[Point], bool],
    ) -> list[Choice]:
        """Up to `count` points worth measuring after these trials, the worthiest first.

        Raises:
            ValueError: the trials are too few to fit anything to.
        """
        question = self._question
        screened = self.screened(records)
        beliefs = self._believed(records)
        pool = [p for p in screened.points[: self._effort.refreshed] if not excluded(p)]
        pool += self._best_of_each_class(screened, excluded)
        leaders = self._leaders(records, beliefs, pool)
        methods = self._methods(records)
        for leader in leaders:
            pool += [
                p
                for p in neighbours(question.space, question.base, leader, methods)
                if not excluded(p)
            ]
        unique = list({str(sorted(p.items())): p for p in pool}.values())
        points = _first_of_each_class(_worthiest(beliefs, unique), SHORTLIST)
        if not points:
            return []
        incumbents = self._incumbents(records, beliefs)
        sampled = beliefs.sampled([*points, *incumbents])
        # Incumbents met the limits when they were measured, whatever the samples say.
        known = sampled.rows(range(len(points), len(points) + len(incumbents)))
        ran = [r.missed for r in records if r.outcome == "ok" and r.objective is not None]
        reached = Reached.by(known, max(1e-3, min(ran, default=1.0)))
        candidates = sampled.rows(range(len(points)))
        chosen = []
        if len(ran) <= 1:
            # What is surest comes first: the best with the weights and the cache that are known.
            chosen = [i for i, p in enumerate(points) if self._is_default_class(p)][:1]
            for index in chosen:
                reached = reached.and_also(candidates.rows([index]))
        rest = [i for i in range(len(points)) if i not in chosen]
        chosen += [rest[i] for i, _ in choose(candidates.rows(rest), reached, count - len(chosen))]
        return [Choice("forecast", points[i], beliefs.forecast(points[i])) for i in chosen]

    def forecast(
        self, records: Sequence[TrialRecord], point: Point, window: int = 0
    ) -> Forecast | None:
        """What a trial at a point is expected to measure after these trials.

        Raises:
            ValueError: the trials are too few to fit anything to.
        """
        beliefs = self._believed(records)
        if not window:
            return beliefs.forecast(point)
        elsewhere = self._forecaster(records[: self._version(records)], window)
        return beliefs.forecast(point, elsewhere)

    def _forecaster(self, records: Sequence[TrialRecord], window: int = 0) -> SimulatedTrials:
        key = len(records), window
        if key not in self._fitted:
            self._fitted[key] = self._fit(records, window)
        return self._fitted[key]

    def _first(self, records: Sequence[TrialRecord]) -> int:
        """How many trials there are up to the first that ran."""
        for place, record in enumerate(records):
            if record.outcome == "ok" and record.metrics is not None:
                return place + 1
        raise ValueError("no trial ran yet")

    def _version(self, records: Sequence[TrialRecord]) -> int:
        """How many of the trials the costs are to be fitted to.

        Fitted again when other weights, another cache or other drafts ran for the first time, and
        whenever the trials are half as many again; in between, the discrepancy learns.
        """
        seen: set[tuple[Any, ...]] = set()
        version = ran = 0
        fitted = 0.0
        for place, record in enumerate(records):
            if record.outcome != "ok" or record.metrics is None:
                continue
            ran += 1
            kind = _kind(record.config)
            if kind not in seen or ran >= 1.5 * fitted:
                version, fitted = place + 1, float(ran)
            seen.add(kind)
        return version

    def _believed(self, records: Sequence[TrialRecord]) -> Beliefs:
        if self._beliefs is None or self._beliefs[0] != len(records):
            forecaster = self._forecaster(records[: self._version(records)])
            beliefs = Beliefs(self._question, forecaster, records, self._effort.draws)
            self._beliefs = len(records), beliefs
        return self._beliefs[1]

    def _methods(self, records: Sequence[TrialRecord]) -> list[str]:
        base = self._question.base
        values = self._question.space.values.get("quantization", (base.quantization,))
        broke = [r.config["quantization"] for r in records if r.outcome == "quality"]
        return fastest_methods(values, base.quantization, broke)

    def _rough(self, model: CostModel, point: Point) -> float | None:
        question = self._question
        config = question.space.config_of(point, question.base)
        try:
            cache = model.cache(config)
            if cache is None:
                return None
            draw = model.middle(config)
            check_drafts(config, draw.drafts)
        except (NotPredictable, EngineError):
            return None
        slo, objective = question.slo, question.objective
        return rough_worth(self._demand, config, draw, cache, slo, objective, self._rough_drafts)

    def _simulated(self, forecaster: SimulatedTrials, point: Point) -> float | None:
        config = self._question.space.config_of(point, self._question.base)
        values = forecaster.simulate(config)
        return None if values is None else self._question.worth(values)

    def _best_of_each_class(
        self, screened: Screened, excluded: Callable[[Point], bool]
    ) -> list[Point]:
        """The two worthiest points of each kind of kernels and of drafts, as may be misjudged."""
        kept: dict[tuple[Any, ...], list[Point]] = {}
        for point in screened.points:
            for kind in _kinds(point):
                if len(kept.setdefault(kind, [])) < 2 and not excluded(point):
                    kept[kind].append(point)
        return [point for points in kept.values() for point in points]

    def _leaders(
        self, records: Sequence[TrialRecord], beliefs: Beliefs, pool: Sequence[Point]
    ) -> list[Point]:
        points = [*pool, *self._incumbents(records, beliefs)]
        return _worthiest(beliefs, points)[:STARTS]

    def _is_default_class(self, point: Point) -> bool:
        base = self._question.base
        return all(point.get(n, getattr(base, n)) == getattr(base, n) for n in CLASS_KNOBS)

    def _incumbents(self, records: Sequence[TrialRecord], beliefs: Beliefs) -> list[Point]:
        """Where the best trials ran that met the SLO."""
        sign = -1.0 if self._question.objective.maximise else 1.0
        met = [r for r in records if r.slo_met and r.objective is not None]
        met.sort(key=lambda r: (sign * (r.objective or 0.0), r.number))
        points = [p for r in met[:INCUMBENTS] if (p := beliefs.point_of(r)) is not None]
        return [p for p, w in zip(points, beliefs.worths(points), strict=True) if w is not None]


def _worthiest(beliefs: Beliefs, points: Sequence[Point]) -> list[Point]:
    """Points that can be simulated, by what they are worth."""
    known = [
        (worth, point)
        for worth, point in zip(beliefs.worths(points), points, strict=True)
        if worth is not None
    ]
    return [point for _, point in sorted(known, key=lambda pair: -pair[0])]


def _first_of_each_class(points: Sequence[Point], most: int) -> list[Point]:
    """The first `most`, but at least the first of each kind of kernels and of drafts."""
    seen: set[tuple[Any, ...]] = set()
    heads: list[Point] = []
    rest: list[Point] = []
    for point in points:
        kinds = _kinds(point)
        (rest if seen.issuperset(kinds) else heads).append(point)
        seen.update(kinds)
    return [*heads, *rest][: max(most, len(heads))]


def _kind(values: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(values.get(name) for name in ALIKE_KNOBS)


def _kinds(point: Point) -> tuple[tuple[Any, ...], ...]:
    """The kind of its kernels, and the kind of its drafts."""
    kernels = tuple(point.get(name) for name in CLASS_KNOBS)
    return ("kernels", *kernels), ("drafts", point.get("speculative_method"))
