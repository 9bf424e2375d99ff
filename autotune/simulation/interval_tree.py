"""Metrics of many plays, put together number by number: a value with its bounds, or a median."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from autotune.simulation.interval import Interval
from autotune.slo import statistic_of

Tree = Mapping[str, Any]


def intervals_of(value: Tree, draws: Sequence[Tree]) -> dict[str, Any]:
    """The same tree with an `Interval` for each number of `value`, its bounds from the draws.

    Draws in which a number is undefined say nothing of it; what is undefined in `value` stays None.
    """

    def interval(middle: Any, drawn: Sequence[Any]) -> Any:
        known = [float(number) for number in drawn if number is not None]
        if middle is None:
            return None
        return Interval.of(float(middle), known or [float(middle)])

    return _merged(interval, value, draws)


def medians_of(draws: Sequence[Tree]) -> dict[str, Any]:
    """The same tree with the median of each number; None where most draws leave it undefined."""

    def median(_: Any, drawn: Sequence[Any]) -> Any:
        known = [float(number) for number in drawn if number is not None]
        return statistic_of(known, "p50") if 2 * len(known) > len(drawn) else None

    return _merged(median, draws[0], draws)


def plain(value: Any) -> Any:
    """A tree for JSON: intervals by their keys, None for what is infinite."""
    if isinstance(value, Interval):
        return {name: _finite(number) for name, number in value.to_json().items()}
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items()}
    return value


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _merged(
    leaf: Callable[[Any, Sequence[Any]], Any], first: Tree, draws: Sequence[Tree]
) -> dict[str, Any]:
    return {
        name: _merged(leaf, part, [draw[name] for draw in draws])
        if isinstance(part, Mapping)
        else leaf(part, [draw[name] for draw in draws])
        for name, part in first.items()
    }
