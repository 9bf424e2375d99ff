"""How numbers of a simulation are written."""

from __future__ import annotations

import pytest

from autotune.cli.simulate_summary import _cell, _number
from autotune.simulation.interval import Interval


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.0, "0"),
        (0.0123, "0.01"),
        (0.123, "0.12"),
        (1.234, "1.23"),
        (12.34, "12.3"),
        (99.96, "100"),
        (123.4, "123"),
        (9876.0, "9876"),
        (80.0, "80"),
    ],
)
def test_numbers_are_short(number: float, text: str) -> None:
    assert _number(number) == text


def test_bounds_stand_in_brackets_if_they_say_something() -> None:
    assert _cell(Interval(1.5, 1.0, 2.25), 1e3) == "1500 (1000-2250)"
    assert _cell(Interval(0.5, 0.25, 0.75), 100, "%") == "50% (25-75)"
    assert _cell(Interval(80.0, 80.0, 80.0)) == "80"
    assert _cell(None) == "-"
