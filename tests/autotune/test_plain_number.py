import math

import pytest

from autotune.plain_number import plain_number


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (12345.6, 4, "12346"),
        (1234.5, 3, "1234"),
        (999.6, 3, "1000"),
        (99.96, 3, "100"),
        (12.345, 3, "12.3"),
        (0.01234, 3, "0.0123"),
        (4.0, 4, "4"),
        (0.0, 3, "0"),
        (-54321.0, 3, "-54321"),
        (math.inf, 4, "inf"),
    ],
)
def test_no_number_has_an_exponent(value: float, digits: int, text: str) -> None:
    assert plain_number(value, digits) == text
    assert float(text) == pytest.approx(value, rel=10.0 ** (1 - digits))
