"""What an hour of a GPU costs, where that price was listed and when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars for one GPU for one hour, on demand.

    `low` and `high` are what others ask for the same GPU; all three are equal for a price that the
    user gave. `date` (YYYY-MM-DD) is when the price was listed, None where the user told none.
    """

    usd_per_hour: float
    low: float
    high: float
    where: str
    date: str | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "usd_per_hour": self.usd_per_hour,
            "low": self.low,
            "high": self.high,
            "where": self.where,
            "date": self.date,
        }
