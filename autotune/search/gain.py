"""How much better one configuration is than another, with an interval, from paired rounds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from scipy.special import stdtrit  # of scipy.stats the import takes a second


@dataclass(frozen=True, slots=True)
class Gain:
    """A gain over the default and its confidence interval.

    With unit `ratio`, above 1 is better: candidate over default where more is better, default over
    candidate where less is. With unit `difference`, used where the default's objective was zero in
    some round, above 0 is better, in units of the objective.
    """

    value: float
    low: float
    high: float
    confidence: float
    unit: Literal["ratio", "difference"]

    @property
    def proven(self) -> bool:
        """Whether the whole interval lies on the better side."""
        return self.low > (1.0 if self.unit == "ratio" else 0.0)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def paired_gain(
    default: Sequence[float],
    candidate: Sequence[float],
    *,
    maximise: bool,
    confidence: float = 0.95,
    comparisons: int = 1,
) -> Gain | None:
    """Gain of a candidate over the default, both measured once in each of several rounds.

    Round i of both saw the same load, so what the rounds share cancels: the interval is Student's t
    over the logarithms of the rounds' ratios (over their differences if a ratio is undefined).
    With several candidates the confidence is shared among the `comparisons` (Bonferroni), so that
    naming the best of them keeps the stated confidence.

    Returns None with fewer than two rounds: no interval can be given.
    """
    if len(default) != len(candidate):
        raise ValueError("rounds must be paired")
    n = len(default)
    if n < 2:
        return None
    quantile = float(stdtrit(n - 1, 1 - (1 - confidence) / (2 * comparisons)))
    pairs = list(zip(default, candidate, strict=True))
    as_ratio = all(d > 0 and c > 0 for d, c in pairs)
    if as_ratio:
        logs = [(math.log(c) - math.log(d)) * (1 if maximise else -1) for d, c in pairs]
        middle, spread = statistics.fmean(logs), statistics.stdev(logs) / math.sqrt(n)
        # A t interval over wildly scattered rounds may overflow; the text then says "unbounded".
        low, high = (
            math.exp(max(-700.0, min(700.0, middle + s * quantile * spread))) for s in (-1, 1)
        )
        return Gain(math.exp(middle), low, high, confidence, "ratio")
    differences = [(c - d) if maximise else (d - c) for d, c in pairs]
    middle, spread = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(n)
    return Gain(
        middle,
        middle - quantile * spread,
        middle + quantile * spread,
        confidence,
        "difference",
    )
