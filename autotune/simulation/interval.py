"""A predicted number with the bounds of its central 90%."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LOW, HIGH = 0.05, 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """low <= value <= high; the truth lies between the bounds with 90% confidence."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, draws: Sequence[float]) -> Interval:
        """Bounds from draws, widened to hold the value."""
        low, high = np.quantile(np.asarray(draws, dtype=np.float64), (LOW, HIGH))
        return cls(value, min(value, float(low)), max(value, float(high)))

    def scaled(self, factor: float) -> Interval:
        """All three times a factor above 0."""
        return Interval(self.value * factor, self.low * factor, self.high * factor)

    def to_json(self) -> dict[str, Any]:
        """By the keys of `--json`."""
        return {"value": self.value, "low": self.low, "high": self.high}
