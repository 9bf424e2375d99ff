"""What a limit's quantity would come to under changes, told from the measurement on."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autotune.advise.advice import Advice
from autotune.predict.apply import UNMEASURED_KNOBS
from autotune.predict.change import Change
from autotune.predict.gain import BETTER_ABOVE, PredictedGain
from autotune.predict.predictor import Predictor
from autotune.profiling.schema import Profile
from autotune.records import LimitResult
from autotune.slo import Slo
from autotune.slo_grammar import LATENCIES, Limit

NO_CHANGE = Change()


@dataclass(frozen=True, slots=True)
class Prospect:
    """A change and what the limit's quantity would be with it, in the limit's unit.

    `low` and `high` bound it; `how` says the change in words, empty for none. `scale` is what
    predictions with `change` are multiplied by, for knobs that the predictor cannot judge by
    themselves and whose gain is known from the advice alone.
    """

    change: Change
    value: float
    low: float
    high: float
    how: str = ""
    scale: float = 1.0


class Outlook:
    """Predictions about one limit.

    A prediction is taken as a ratio to the prediction of what was measured, where both are finite:
    what the predictor gets wrong of the machine falls out.
    """

    def __init__(
        self,
        profile: Profile,
        predictor: Predictor | None,
        slo: Slo,
        limit: Limit,
        advice: Sequence[Advice],
    ) -> None:
        self.limit = limit
        self._slo = slo
        self._predictor = predictor
        self._advice = advice
        metrics = profile.metrics
        self.result: LimitResult | None = None if metrics is None else self._evaluate(metrics)
        self.measured = self.result.measured if self.result is not None else None
        self._interval = _interval(limit, metrics or {})

    def predict(self, change: Change = NO_CHANGE, rate_factor: float = 1.0) -> float | None:
        """The quantity after a change; infinite where requests would not finish, None if unknown.

        `rate_factor` multiplies the load.
        """
        predicted = self._raw(change, rate_factor)
        if predicted is None or not math.isfinite(predicted):
            return predicted
        base = self._base
        if self.measured is None or base is None or not math.isfinite(base) or base <= 0:
            return predicted
        return self.measured * predicted / base

    def meets(self, value: float | None) -> bool:
        """Whether a value of the quantity meets the limit."""
        return value is not None and self.limit.met_by(value)

    def best(self) -> Prospect | None:
        """The best that knobs would make of it: none, one piece of advice, or the good ones joined.

        None where nothing is known, or nothing would be finite.
        """
        found = [self._as_measured()]
        singles = [(a, p) for a in self._testable() if (p := self._with_advice(a)) is not None]
        found += [prospect for _, prospect in singles]
        found.append(self._joined([advice for advice, _ in singles]))
        known = [p for p in found if p is not None and math.isfinite(p.value)]
        better = min if self.limit.operator in ("<", "<=") else max
        return better(known, key=lambda p: p.value, default=None)

    def with_technique(self, advice: Advice) -> Prospect | None:
        """What one piece of advice would make of it, whether or not it can be tested here."""
        return self._with_advice(advice)

    def _testable(self) -> list[Advice]:
        return [advice for advice in self._advice if advice.testable and advice.knobs]

    def _as_measured(self) -> Prospect | None:
        value = self.measured
        if value is None:
            value = self.predict()
            return None if value is None else Prospect(NO_CHANGE, value, value, value)
        low, high = self._interval or (value, value)
        return Prospect(NO_CHANGE, value, low, high)

    def _with_advice(self, advice: Advice) -> Prospect | None:
        gain = self._gain(advice)
        judged = not advice.knobs.keys() & set(UNMEASURED_KNOBS)
        change = Change(advice.knobs) if judged else NO_CHANGE
        if gain is None or self.measured is None:
            if not advice.testable or not advice.knobs or not judged:
                return None
            value = self.predict(change)
            return None if value is None else Prospect(change, value, value, value, advice.title)
        scales = [self._scale(g) for g in (gain.value, gain.low, gain.high)]
        low, high = sorted(scales[1:])
        return Prospect(
            change,
            self.measured * scales[0],
            self.measured * low,
            self.measured * high,
            advice.title,
            1.0 if judged else scales[0],
        )

    def _scale(self, gain: float) -> float:
        """What a gain multiplies the quantity by; it is above 1 where it makes things better."""
        return gain if self.limit.operator in (">", ">=") else 1 / gain

    def _joined(self, advice: Sequence[Advice]) -> Prospect | None:
        """The knobs of all advice that helps, the better first where two set the same.

        Its interval is as wide as the widest of the parts'.
        """
        judged: dict[str, Any] = {}
        taken: set[str] = set()
        joined: list[tuple[Advice, PredictedGain]] = []
        scale = 1.0
        gains = [(gain, a) for a in advice if (gain := self._gain(a)) is not None]
        for gain, item in sorted(gains, key=lambda pair: -pair[0].value):
            if gain.value <= BETTER_ABOVE or taken & item.knobs.keys():
                continue
            taken |= item.knobs.keys()
            joined.append((item, gain))
            if not item.knobs.keys() & set(UNMEASURED_KNOBS):
                judged |= item.knobs
            else:
                scale *= self._scale(gain.value)
        if len(joined) < 2:
            return None
        change = Change(judged)
        value = self.predict(change)
        if value is None:
            return None
        value *= scale
        doubts = [(g.low / g.value, g.high / g.value) for _, g in joined]
        ends = [self._scale(min(d[0] for d in doubts)), self._scale(max(d[1] for d in doubts))]
        how = ", ".join(item.title for item, _ in joined)
        return Prospect(change, value, value * min(ends), value * max(ends), how, scale)

    def _gain(self, advice: Advice) -> PredictedGain | None:
        statistic = self.limit.statistic
        return next(
            (
                gain
                for gain in advice.gains
                if gain.metric == self.limit.metric
                and gain.statistic in (None, statistic)
                and gain.low > 0
            ),
            None,
        )

    @functools.cached_property
    def _base(self) -> float | None:
        return self._raw(NO_CHANGE, 1.0)

    def _raw(self, change: Change, rate_factor: float) -> float | None:
        if self._predictor is None:
            return None
        metrics = self._predictor.metrics(change, rate_factor)
        if metrics is None:
            return None
        result = self._evaluate(metrics)
        if result.measured is not None:
            return result.measured
        # Of requests that do not finish a latency is infinite; of none at all nothing is known.
        finished = metrics.get("completed") or 0
        return math.inf if finished and self.limit.metric in LATENCIES and not result.met else None

    def _evaluate(self, metrics: Mapping[str, Any]) -> LimitResult:
        """The limit's result; the whole SLO decides what goodput is."""
        results = self._slo.evaluate(metrics)
        return results[self._slo.limits.index(self.limit)]


def _interval(limit: Limit, metrics: Mapping[str, Any]) -> tuple[float, float] | None:
    """The interval of the measured quantity, where it was told."""
    of_metric = metrics.get(limit.metric)
    if not isinstance(of_metric, Mapping):
        return None
    found = (of_metric.get("intervals") or {}).get(limit.statistic)
    return (float(found[0]), float(found[1])) if found else None
