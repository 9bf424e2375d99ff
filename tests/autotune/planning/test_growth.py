"""Growth as it is written, and when it has outgrown what was bought."""

from __future__ import annotations

import math

import pytest

from autotune.errors import BadInput
from autotune.planning.growth import Growth, parse_growth


@pytest.mark.parametrize(
    ("text", "factor", "months"),
    [
        ("2x/6mo", 2.0, 6.0),
        (" 1.5x / mo ", 1.5, 1.0),
        ("30%/year", 1.3, 12.0),
        ("3X/2y", 3.0, 24.0),
        ("10%/4weeks", 1.1, 4 * 12 * 7 / 365.25),
    ],
)
def test_it_is_read_as_written(text: str, factor: float, months: float) -> None:
    growth = parse_growth(text)
    assert growth.factor == pytest.approx(factor)
    assert growth.months == pytest.approx(months)


@pytest.mark.parametrize(
    "text", ["", "fast", "2x", "x/6mo", "0.5x/6mo", "1x/6mo", "2x/0mo", "2x/6", "2000x/mo", "-5%/y"]
)
def test_what_does_not_grow_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(BadInput, match="--growth") as refused:
        parse_growth(text)
    assert "\n" not in str(refused.value)


def test_the_rate_reaches_a_target_when_it_says() -> None:
    growth = Growth(2.0, 6.0)
    months = growth.months_until(50.0, 137.0)
    assert months is not None
    assert growth.rate_after(50.0, months) == pytest.approx(137.0)
    assert months == pytest.approx(6 * math.log2(137 / 50))


def test_what_is_outgrown_already_or_never_is_told_apart() -> None:
    growth = Growth(1.1, 12.0)
    assert growth.months_until(10.0, 9.0) == 0.0
    assert growth.months_until(10.0, 1000.0) is None
