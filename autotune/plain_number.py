"""Numbers as people read and type them: `12345`, where `g` alone writes `1.23e+04`."""

from __future__ import annotations


def plain_number(value: float, digits: int = 3) -> str:
    """A number in so many significant digits, and in all digits before its point.

    Infinity is `inf`. Below 0.0001 there is an exponent.
    """
    short = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e+" in short else short
