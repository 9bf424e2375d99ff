"""95% intervals in closed form."""

from __future__ import annotations

import math

from scipy.special import stdtrit

CONFIDENCE = 0.95
Z_95 = 1.959963984540054  # standard normal quantile of (1 + CONFIDENCE) / 2


def wilson_interval(successes: float, trials: float) -> tuple[float | None, float | None]:
    """95% interval of a share (Wilson 1927); (None, None) without trials.

    Unlike the bootstrap it does not claim certainty when every request, or none, succeeded. Trials
    that depend on each other count as fewer, which need not be whole.
    """
    if trials == 0:
        return None, None
    share = successes / trials
    spread = Z_95 * math.sqrt(share * (1 - share) / trials + (Z_95 / (2 * trials)) ** 2)
    scale = 1 + Z_95 * Z_95 / trials
    centre = share + Z_95 * Z_95 / (2 * trials)
    # At the ends a bound is exactly 0 or 1, which rounding would miss.
    low = (centre - spread) / scale if successes > 0 else 0.0
    high = (centre + spread) / scale if successes < trials else 1.0
    return low, high


def student_95(freedom: int) -> float:
    """Standard errors on either side of a mean of `freedom` + 1 values: Student's quantile."""
    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))
