"""How much slower than their fitted cost steps were, as the load went on.

A fit tells what an undisturbed step takes. Neighbours, clocks and the system's own work make steps
longer for moments; a prediction that left that out would see too short queues. So the replay goes
through the same slow and fast moments as the measurement did.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from autotune.predict.step_cost import StepCost, StepWork
from engine.step_record import StepRecord

# Lengths of the moments: shorter ones hold too few steps to tell a slow moment from a long step.
_WINDOW_S = 0.5
_MOST_WINDOWS = 200
# Seconds of predicted work below which a moment tells nothing of its own.
_LEAST_WORK = 0.1
_LIMITS = (0.5, 8.0)


@dataclass(frozen=True, slots=True)
class Pace:
    """Factors on a step's time: `factors[i]` in the i-th window of `window_s`, `mean` beyond.

    `drift` is the standard deviation of the logarithm of a whole trial's mean factor, as far as the
    windows' spread tells.
    """

    mean: float = 1.0
    window_s: float = math.inf
    factors: tuple[float, ...] = ()
    drift: float = 0.0

    def at(self, now: float) -> float:
        """The factor at a moment, in seconds since the load began."""
        index = int(now / self.window_s)
        return self.factors[index] if index < len(self.factors) else self.mean

    def holds_until(self, now: float) -> float:
        """Until when the factor of a moment holds at least, in seconds."""
        index = int(now / self.window_s)
        return (index + 1) * self.window_s if index < len(self.factors) else math.inf

    @property
    def steady(self) -> Pace:
        """The mean at every moment, for traffic that takes another time."""
        return Pace(mean=self.mean, drift=self.drift)

    def turned(self, windows: int) -> Pace:
        """The same moments, of which so many of the last come first."""
        if not self.factors:
            return self
        windows %= len(self.factors)
        turned = self.factors[len(self.factors) - windows :] + self.factors[: -windows or None]
        return replace(self, factors=turned)

    def slowed(self, factor: float) -> Pace:
        """Steps that take `factor` times as long at every moment."""
        factors = tuple(factor * f for f in self.factors)
        return replace(self, mean=factor * self.mean, factors=factors)


STEADY = Pace()


def recorded_pace(steps: Sequence[StepRecord], cost: StepCost) -> Pace:
    """The pace of a load whose steps were expected to take what `cost` says."""
    if not steps:
        return STEADY
    starts = np.array([step.start for step in steps])
    measured = np.array([step.seconds - step.draft_seconds for step in steps])
    works = [StepWork.of(step) for step in steps]
    expected = np.array([cost.device_seconds(w) + cost.host_seconds(w) for w in works])
    if expected.sum() <= 0:
        return STEADY
    mean = _within(float(measured.sum() / expected.sum()))
    span = float(starts[-1] + measured[-1])
    window = max(_WINDOW_S, span / _MOST_WINDOWS)
    index = np.clip((starts / window).astype(np.int64), 0, None)
    count = int(index.max()) + 1
    took = np.bincount(index, weights=measured, minlength=count)
    should = np.bincount(index, weights=expected, minlength=count)
    # Pulled to the mean as if so much work at the mean pace had been seen beside.
    factors = (took + mean * _LEAST_WORK) / (should + _LEAST_WORK)
    busy = factors[should >= _LEAST_WORK]
    drift = float(np.std(np.log(busy)) / math.sqrt(len(busy))) if len(busy) > 1 else 0.0
    return Pace(mean, window, tuple(_within(float(f)) for f in factors), drift)


def _within(factor: float) -> float:
    return min(max(factor, _LIMITS[0]), _LIMITS[1])
