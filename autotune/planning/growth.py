"""How a rate grows, and how long what was bought holds."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from autotune.errors import BadInput

_GROWTH = re.compile(
    r"(?P<value>\d+(?:\.\d+)?)\s*(?P<kind>x|%)\s*/\s*(?P<count>\d+(?:\.\d+)?)?\s*"
    r"(?P<unit>mo|month|months|y|yr|year|years|w|week|weeks)"
)
_MONTHS = {"m": 1.0, "y": 12.0, "w": 12 * 7 / 365.25}
# Beyond this nobody plans, and the GPUs of the catalogue are history.
HORIZON_MONTHS = 36.0
_MARKS = (0.0, 3.0, 6.0, 12.0, 18.0, 24.0, 36.0)


@dataclass(frozen=True, slots=True)
class Growth:
    """The rate is `factor` times as high after every `months` months."""

    factor: float
    months: float

    def rate_after(self, rate: float, months: float) -> float:
        """The rate after so many months: rate * factor^(months / every)."""
        return rate * float(self.factor ** (months / self.months))

    def months_until(self, rate: float, target: float) -> float | None:
        """Months until a rate reaches another; 0 if it has, None beyond the horizon."""
        if rate >= target:
            return 0.0
        if self.factor <= 1:
            return None
        months = self.months * math.log(target / rate) / math.log(self.factor)
        return months if months <= HORIZON_MONTHS else None

    def marks(self) -> list[float]:
        """The months that a timeline shows."""
        return list(_MARKS)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"factor": self.factor, "months": self.months}

    def __str__(self) -> str:
        return f"{self.factor:g}x every {self.months:g} months"


def parse_growth(text: str, flag: str = "--growth") -> Growth:
    """Growth such as `2x/6mo`, `30%/year` or `1.5x/mo`.

    Raises:
        BadInput: it is none, or it does not grow.
    """
    found = _GROWTH.fullmatch(text.strip().lower())
    if found is None:
        raise BadInput(
            f"{flag} {text!r} is not a growth: write for instance 2x/6mo, 30%/year or 1.2x/mo"
        )
    value, count = float(found["value"]), float(found["count"] or 1)
    factor = value if found["kind"] == "x" else 1 + value / 100
    months = count * _MONTHS[found["unit"][0]]
    if not 1 < factor <= 1000 or not 0 < months <= 120:
        raise BadInput(
            f"{flag} {text!r}: the factor must be above 1 and at most 1000, and the time at most "
            "10 years"
        )
    return Growth(factor, months)
