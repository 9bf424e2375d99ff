"""How loads' speeds differ: from one to the next, and from one moment to another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autotune.predict.calibration_sample import LoadSample
from autotune.predict.pace import Pace
from autotune.predict.robust_fit import Floats

WINDOW_S = 0.5
# Work that is too little to tell a moment from a long step is pulled to the mean as if so many
# seconds of work at that speed had been seen beside.
_LEAST_WORK_S = 0.1
_LEAST_FACTOR = 0.5
# Moments so many times slower than the middle one are stalls.
STALL = 2.5
# Moments are gone through again where a simulation is longer than what was measured.
_MOST_WINDOWS = 1200
# Before any two loads were seen, the machine's speed is expected to differ by so much from one to
# the next (standard deviation of a logarithm), as if it had been seen so often.
DRIFT = 0.04
_DRIFT_SEEN = 4


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast a load ran: `total` times as long as expected, by and large.

    `middle` is that of its middle step. `moments` are how many times as long as by `total` steps
    took in each `WINDOW_S`. Stalls, in which something else had the machine, are in none of them.
    """

    total: float = 1.0
    middle: float = 1.0
    moments: tuple[float, ...] = ()


def speed(sample: LoadSample, measured: Floats, expected: Floats) -> Speed:
    """The speed of a load, by the seconds of each sampled step that were measured and expected."""
    if not len(expected) or expected.min() <= 0:
        return Speed()
    starts = sample.starts - sample.starts.min()
    index = (starts / WINDOW_S).astype(np.int64)
    took = _sums(index, sample.every * measured)
    should = _sums(index, sample.every * expected)
    usual = _usual(took, should)
    mean = float(took[usual].sum() / should[usual].sum())
    factors = (took + _LEAST_WORK_S) / (mean * should + _LEAST_WORK_S)
    return Speed(
        mean,
        float(np.median(measured / expected)),
        tuple(float(f) for f in np.maximum(factors[usual], _LEAST_FACTOR)),
    )


def _sums(index: NDArray[np.int64], values: Floats) -> Floats:
    return np.asarray(np.bincount(index, weights=values), dtype=np.float64)


def _usual(took: Floats, should: Floats) -> NDArray[np.bool_]:
    """Which moments had work, and were no stalls."""
    busy = should > 0
    ratios = took[busy] / should[busy]
    order = np.argsort(ratios)
    work = np.cumsum(should[busy][order])
    middle = float(ratios[order][np.searchsorted(work, work[-1] / 2)])
    return np.asarray(busy & (took <= STALL * middle * should), dtype=bool)


def drift(logs: Sequence[float]) -> float:
    """Standard deviation of the logarithm of a load's speed, from those of some loads."""
    mean = sum(logs) / len(logs)
    squares = _DRIFT_SEEN * DRIFT**2 + sum((log - mean) ** 2 for log in logs)
    return math.sqrt(squares / (_DRIFT_SEEN + len(logs) - 1))


def played_pace(mean: float, factors: Sequence[float], turned: float = 0.0) -> Pace:
    """A pace that goes through the moments, again and again; `turned` (0..1) tells from where."""
    if not factors:
        return Pace(mean=mean)
    first = int(turned * len(factors)) % len(factors)
    once = [mean * factor for factor in (*factors[first:], *factors[:first])]
    repeats = math.ceil(_MOST_WINDOWS / len(once))
    return Pace(mean=mean, window_s=WINDOW_S, factors=tuple((once * repeats)[:_MOST_WINDOWS]))
