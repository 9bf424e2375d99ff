"""A predicted number as the page reads it: with its bounds, or plain where there are none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from reports.formatting import mapping, number


@dataclass(frozen=True, slots=True)
class Estimate:
    """low <= value <= high, the central 90%; all three equal where no bounds are known."""

    value: float
    low: float
    high: float

    @property
    def spread(self) -> bool:
        """Whether there are bounds."""
        return self.low < self.high

    def times(self, factor: float) -> Estimate:
        """All three times a factor above 0."""
        return Estimate(self.value * factor, self.low * factor, self.high * factor)

    def written(self, write: Callable[[float | None], str], unit: str = "") -> str:
        """The value and, in brackets, its bounds; `unit` is dropped from the bounds."""
        text = write(self.value)
        if not self.spread:
            return text
        low, high = (write(end).removesuffix(unit).rstrip() for end in (self.low, self.high))
        return f"{text} ({low}–{high})"


def read_estimate(value: object) -> Estimate | None:
    """A number, or an object with value, low and high; None where it is neither."""
    plain = number(value)
    if plain is not None:
        return Estimate(plain, plain, plain)
    parts = mapping(value)
    middle, low, high = (number(parts.get(key)) for key in ("value", "low", "high"))
    if middle is None:
        return None
    ends = [end for end in (low, high) if end is not None]
    return Estimate(middle, min([middle, *ends]), max([middle, *ends]))
