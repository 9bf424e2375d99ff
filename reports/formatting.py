"""How numbers are written for people: three significant digits, milliseconds, and units."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

MISSING = "–"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: object) -> float | None:
    """The value as a finite float, or None where it is no such number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        result = float(value)
    except OverflowError:
        return None
    return result if math.isfinite(result) else None


def mapping(value: object) -> Mapping[str, Any]:
    """The value if it is a JSON object, else an empty one: records may be incomplete."""
    return value if isinstance(value, dict) else {}


def sequence(value: object) -> Sequence[Any]:
    """The value if it is a JSON array, else an empty one."""
    return value if isinstance(value, list) else ()


def significant(value: float | None, digits: int = 3) -> str:
    """A number with that many significant digits; grouped thousands; no needless zeros."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    if not math.isfinite(value):  # a change of unit overflowed
        return "beyond ±10³⁰⁰"
    exponent = math.floor(math.log10(abs(value)))
    if exponent >= 9 or exponent < -4:
        mantissa = f"{value / 10.0**exponent:.{digits - 1}f}" if exponent > -300 else "0"
        return f"{mantissa}×10{str(exponent).translate(_SUPERSCRIPT)}"
    decimals = max(0, digits - 1 - exponent)
    # A number of more digits than asked for is an integer here: rounding 1,234 to 1,230 hides.
    text = f"{value:,.{decimals}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")


def fixed(value: float | None, decimals: int = 2) -> str:
    """A number with a fixed count of decimals, for ratios that stand side by side."""
    if value is None:
        return MISSING
    return significant(value) if abs(value) >= 1000 else f"{value:.{decimals}f}"


def milliseconds(seconds: float | None) -> str:
    """Seconds as milliseconds, with the unit."""
    return MISSING if seconds is None else f"{significant(seconds * 1000)} ms"


def percent(share: float | None, digits: int = 3) -> str:
    """A share as a percentage."""
    return MISSING if share is None else f"{significant(share * 100, digits)}%"


def duration(seconds: float | None) -> str:
    """A span of time in the units a person would use."""
    if seconds is None:
        return MISSING
    if seconds < 120:
        return f"{significant(seconds)} s"
    whole = round(seconds)
    if whole < 7200:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 1_000_000_000:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{significant(seconds)} s"


def moment(text: object) -> str:
    """An ISO time to the minute."""
    try:
        at = datetime.fromisoformat(str(text))
    except ValueError:
        return str(text or "")
    return f"{at:%Y-%m-%d %H:%M} {at.tzname() or ''}".strip()


def size(count: float | None) -> str:
    """Bytes in binary units."""
    if count is None:
        return MISSING
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{significant(count)} {unit}"
        count /= 1024
    return f"{significant(count)} TiB"


def quantity(value: float | None, unit: str) -> str:
    """A number with its unit; seconds become milliseconds."""
    if unit in ("s", "seconds"):
        return milliseconds(value)
    return MISSING if value is None else f"{significant(value)} {unit}".strip()


def knob_value(name: str, value: object) -> str:
    """A knob's value: switches as on and off, memory in binary units."""
    if value is None:
        return "automatic"
    if isinstance(value, bool):
        return "on" if value else "off"
    amount = number(value)
    if amount is None:
        return str(value)
    if name.endswith("_bytes"):
        return size(amount)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10000 else str(value)
    return significant(amount, 4)
