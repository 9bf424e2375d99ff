"""95% intervals of statistics over a text that is cut into windows.

Positions of one window share their context, so they are not independent of each other; windows are
taken to be. Every interval here therefore rests on the differences between whole windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit  # of scipy.stats the import takes a second

CONFIDENCE = 0.95
RESAMPLES = 1000

Values = npt.NDArray[np.float64]


def mean_interval(window_means: Values) -> tuple[float, float, float]:
    """(mean, low, high) of means by window, by Student's t; an infinite interval for one window.

    Where the windows are measurements of two models on the same text and each entry is their
    difference, this is the paired interval.
    """
    mean = float(window_means.mean())
    if window_means.size < 2:
        return mean, -math.inf, math.inf
    if not math.isfinite(mean):  # broken weights: no spread to speak of
        return mean, mean, mean
    error = float(window_means.std(ddof=1)) / math.sqrt(window_means.size)
    margin = float(stdtrit(window_means.size - 1, 0.5 + CONFIDENCE / 2)) * error
    return mean, mean - margin, mean + margin


def bootstrap_interval(
    windows: Values, statistic: Callable[[Values], Values], seed: int
) -> tuple[float, float, float]:
    """(value, low, high) of a statistic over all positions, by a block bootstrap over windows.

    windows: [windows, positions]. `statistic` maps [n, positions of a resample] to [n]. Whole
    windows are drawn with replacement `RESAMPLES` times, from a generator with that seed, and the
    interval holds the middle 95% of what the resamples give (the percentile method, Efron 1979).
    """
    value = float(statistic(windows.reshape(1, -1))[0])
    if not math.isfinite(value):
        return value, value, value
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in range(RESAMPLES // 100):  # a hundred at a time bounds the memory
        chosen = generator.integers(len(windows), size=(100, len(windows)))
        drawn.append(statistic(windows[chosen].reshape(100, -1)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(drawn), [tail, 1 - tail])
    return value, float(low), float(high)
