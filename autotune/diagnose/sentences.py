"""Numbers as a newcomer reads them."""

from __future__ import annotations


def percent(share: float) -> str:
    """A share, as `37%`; small ones with a digit more, so that they are not shown as nothing."""
    value = 100 * share
    return f"{value:.1f}%" if 0 < value < 1 else f"{value:.0f}%"


def seconds(value: float) -> str:
    """A time, in the unit that leaves two or three digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.3g} us"


def size(value: float) -> str:
    """Bytes, in the unit that leaves few digits; powers of 1024, as memory is sold."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} bytes"


def number(value: float) -> str:
    """A plain number with three digits, and no more than it needs."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def joined(sentence: str, *parts: str | None) -> str:
    """A sentence with those of the further parts that are known, separated by semicolons."""
    known = [part for part in parts if part]
    return "; ".join([sentence, *known]) + "."
