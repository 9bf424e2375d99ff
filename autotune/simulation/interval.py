"""A predicted number with the bounds of its central 90%."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LOW, HIGH = 0.05, 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """low <= value <= high; the truth lies between the bounds with 90% confidence."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, draws: Sequence[float]) -> Interval:
        """Bounds from draws, of which some may be infinite, widened to hold the value.

        By the quantiles at p (n + 1) of n draws, between which a further one lies with the
        confidence that is told (Hyndman and Fan 1996, type 6) if there are at least 19: of fewer
        the least and the greatest are told, which hold (n - 1) / (n + 1).
        """
        ordered = sorted(draws)
        return cls(value, min(value, _quantile(ordered, LOW)), max(value, _quantile(ordered, HIGH)))

    def scaled(self, factor: float) -> Interval:
        """All three times a factor above 0."""
        return Interval(self.value * factor, self.low * factor, self.high * factor)

    def to_json(self) -> dict[str, Any]:
        """By the keys of `--json`."""
        return {"value": self.value, "low": self.low, "high": self.high}


def _quantile(ordered: Sequence[float], p: float) -> float:
    place = min(max(p * (len(ordered) + 1) - 1, 0.0), len(ordered) - 1.0)
    below = math.floor(place)
    left, part = ordered[below], place - below
    if not part or left == ordered[below + 1]:
        return left
    return left + part * (ordered[below + 1] - left)
