"""A predicted gain: how many times better a metric would be, with its interval."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

# How a prediction was made: `replay` runs the recorded traffic through the real scheduler on fitted
# step costs; `formula` scales the profile's shares (Amdahl); `estimate` rests on published figures.
Basis = Literal["replay", "formula", "estimate"]
Direction = Literal["better", "worse", "no change"]
# A gain between these is no change: two measurements of one config differ by as much.
WORSE_BELOW, BETTER_ABOVE = 0.95, 1.05


@dataclass(frozen=True, slots=True)
class PredictedGain:
    """Ratio of a metric's values without and with a change, so that above 1 is better.

    `metric` is one of ttft, tpot, itl, e2e, throughput, cost, memory, goodput; `statistic`
    names a latency's (`p95`, `mean`). `low` and `high` bound the central 90%.
    """

    metric: str
    value: float
    low: float
    high: float
    basis: Basis
    statistic: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def direction(gain: float) -> Direction:
    """What a gain comes to in a word, predicted or measured."""
    if gain < WORSE_BELOW:
        return "worse"
    return "better" if gain > BETTER_ABOVE else "no change"


def same_direction(predicted: float, measured: float) -> bool:
    """Whether a prediction had the sign right: both up, both down, or both no change to speak of.

    How far up or down is what the error and the interval are held to.
    """
    if direction(predicted) == direction(measured):
        return True
    return (predicted > 1.0) == (measured > 1.0)
