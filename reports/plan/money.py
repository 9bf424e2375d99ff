"""How prices, chances and large amounts are written on the page of a plan."""

from __future__ import annotations

from reports.estimate import Estimate
from reports.formatting import MISSING, significant

# Hours of a month: those of a year of 365 days over twelve.
HOURS_PER_MONTH = 730.0
_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def dollars(value: float | None) -> str:
    """US dollars: whole from 100 on, with cents below, with more digits below a cent."""
    if value is None:
        return MISSING
    if abs(value) >= 100:
        return f"${value:,.0f}"
    return f"${value:,.2f}" if abs(value) >= 0.1 or value == 0 else f"${significant(value, 2)}"


def dollar_range(estimate: Estimate | None) -> str:
    """The bounds as US dollars; empty where they are the value."""
    if estimate is None or not estimate.spread:
        return ""
    return f"{dollars(estimate.low)}–{dollars(estimate.high)}"


def chance(share: float | None, draws: float | None = None) -> str:
    """A probability from draws: none that occurred in all of them is written as certain.

    Where every one of n draws agreed, the bound is that of one that disagrees among n + 1.
    """
    if share is None:
        return MISSING
    least = 0.01 if not draws or draws < 1 else max(1.0 / (draws + 1.0), 0.001)
    if share > 1.0 - least:
        return f"over {_percent(1.0 - least)}"
    if share < least:
        return f"under {_percent(least)}"
    return _percent(share)


def prefixed(value: float | None, unit: str) -> str:
    """A large amount with a decimal prefix before its unit, such as 3.35 TB/s."""
    if value is None:
        return MISSING
    power = 0
    while abs(value) >= 1000 and power < len(_PREFIXES) - 1:
        value, power = value / 1000.0, power + 1
    return f"{significant(value)} {_PREFIXES[power]}{unit}".rstrip()


def _percent(share: float) -> str:
    """Whole percentages: draws are too few for more."""
    text = f"{100.0 * share:.1f}" if share > 0.99 or share < 0.01 else f"{100.0 * share:.0f}"
    return f"{text.removesuffix('.0')}%"
