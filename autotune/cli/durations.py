"""Times and rates as a person writes them on a command line."""

from __future__ import annotations

import math
import re

from autotune.errors import BadInput

_PARTS = re.compile(r"(?:(?P<h>[0-9.]+)h)?(?:(?P<m>[0-9.]+)m(?!s))?(?:(?P<s>[0-9.]+)s?)?")


def parse_duration(text: str, flag: str) -> float:
    """Seconds of a duration such as `90s`, `10m`, `1h30m` or `45`.

    Raises:
        BadInput: it is none; names the flag.
    """
    match = _PARTS.fullmatch(text.strip())
    try:
        if match is None or not text.strip():
            raise ValueError(text)
        hours, minutes, seconds = (float(match[part] or 0) for part in ("h", "m", "s"))
    except ValueError:
        raise BadInput(
            f"{flag} {text!r} is not a duration: write for instance 90s, 10m or 1h30m"
        ) from None
    total = 3600 * hours + 60 * minutes + seconds
    if total <= 0:
        raise BadInput(f"{flag} {text!r} must be above 0")
    return total


def parse_rate(text: str, flag: str) -> float:
    """Requests per second of a rate such as `4`, `0.5` or `inf` (all at once).

    Raises:
        BadInput: it is none, or not above 0.
    """
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not rate > 0:
        raise BadInput(
            f"{flag} {text!r} is not a rate: write requests per second, for instance 4, or inf to "
            "offer all requests at once"
        )
    return rate
