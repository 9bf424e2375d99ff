"""How prices, chances and large amounts are written on the page of a plan."""

from __future__ import annotations

from reports.estimate import Estimate
from reports.formatting import MISSING, significant

# Hours of a month: those of a year of 365 days over twelve.
HOURS_PER_MONTH = 730.0
# Beyond it, more draws would be needed than any plan makes.
_SUREST = 0.99
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


def chance(share: float | None) -> str:
    """A probability: what is predicted is never certain, so none is written as 0 or 100%."""
    if share is None:
        return MISSING
    if share > _SUREST:
        return f"over {100 * _SUREST:.0f}%"
    if share < 1 - _SUREST:
        return f"under {100 * (1 - _SUREST):.0f}%"
    return f"{100 * share:.0f}%"


def prefixed(value: float | None, unit: str) -> str:
    """A large amount with a decimal prefix before its unit, such as 3.35 TB/s."""
    if value is None:
        return MISSING
    power = 0
    while abs(value) >= 1000 and power < len(_PREFIXES) - 1:
        value, power = value / 1000.0, power + 1
    return f"{significant(value)} {_PREFIXES[power]}{unit}".rstrip()
