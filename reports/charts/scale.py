"""From data to pixels: linear and logarithmic scales and their ticks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

SPREAD_FOR_LOG = 25.0
_LARGEST = 1e280  # beyond it, differences and margins of floats overflow


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps `low..high` of the data onto `start..end` pixels; values outside are clamped."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        value = min(max(value, self.low), self.high)
        if self.log:
            # Differences of logarithms: the ratio of two far ends overflows.
            first, last = math.log(self.low), math.log(self.high)
            share = (math.log(value) - first) / (last - first)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """Round values within the scale, about `count` of them."""
        return _log_ticks(self, count) if self.log else _linear_ticks(self, count)


def domain(
    values: Iterable[float], *, zero: bool = False, log: bool | None = None
) -> tuple[float, float, bool]:
    """A (low, high, log) that holds the values with a small margin.

    `zero` starts a linear domain at 0. `log=None` chooses a logarithm where all values are
    positive and the largest is more than 25 times the smallest.
    """
    kept = [min(max(v, -_LARGEST), _LARGEST) for v in values]
    low, high = (min(kept), max(kept)) if kept else (0.0, 1.0)
    if log is None:
        log = low > 0 and high / low > SPREAD_FOR_LOG
    if log and low > 0:
        if high / low < 1.01:
            low, high = low / 2, high * 2
        return low / 1.08, high * 1.08, True
    if zero and low >= 0:
        return 0.0, (high * 1.06 if high > 0 else 1.0), False
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    # What is never negative has no axis below zero.
    return (max(low - margin, 0.0) if low >= 0 else low - margin), high + margin, False


def _linear_ticks(scale: Scale, count: int) -> list[float]:
    rough = (scale.high - scale.low) / max(count, 1)
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough * 0.999)
    first = math.ceil(scale.low / step - 1e-9)
    last = math.floor(scale.high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def _log_ticks(scale: Scale, count: int) -> list[float]:
    first, last = math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high))
    stride = max(1, math.ceil((last - first) / max(count, 1)))
    decades = range(first, last + 1, stride)
    for multiples in ((1,), (1, 3), (1, 2, 5), tuple(range(1, 10))):
        ticks = [
            tick
            for decade in decades
            for m in multiples
            if scale.low <= (tick := m * 10.0**decade) <= scale.high
        ]
        if len(ticks) >= min(count - 1, 4) or stride > 1:
            return ticks
    return ticks
