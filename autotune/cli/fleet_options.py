"""Links, times and chances as a person writes them on a command line."""

from __future__ import annotations

import re

from autotune.errors import BadInput

_BYTES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_RATE = re.compile(
    r"(?P<number>\d+(?:\.\d*)?|\.\d+)\s*(?P<prefix>[kKMGT]?)"
    r"(?:(?P<bytes>i?B)(?:/s|ps)|(?P<bits>bit/s|bps|b/s))"
)
_TIME = re.compile(r"(?P<number>\d+(?:\.\d*)?|\.\d+)\s*(?P<unit>us|ms|s)")
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def parse_bandwidth(text: str, flag: str) -> float:
    """Bytes per second of a rate such as `25GB/s` or `200Gbit/s`.

    Raises:
        BadInput: it is none, or not above 0; names the flag.
    """
    match = _RATE.fullmatch(text.strip())
    if match is None:
        raise BadInput(
            f"{flag} {text!r} is not a bandwidth: write for instance 25GB/s or 200Gbit/s"
        )
    prefix = match["prefix"].upper()
    if match["bytes"] == "iB":
        if not prefix:
            raise BadInput(f"{flag} {text!r} is not a bandwidth: write for instance 25GiB/s")
        scale = float(_BINARY[prefix])
    else:
        scale = _BYTES[prefix] / (8 if match["bits"] else 1)
    rate = float(match["number"]) * scale
    if not rate > 0:
        raise BadInput(f"{flag} {text!r} must be above 0")
    return rate


def parse_short_time(text: str, flag: str) -> float:
    """Seconds of a time such as `500us`, `2ms` or `0.1s`; 0 needs no unit.

    Raises:
        BadInput: it is none; names the flag.
    """
    if text.strip() == "0":
        return 0.0
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise BadInput(f"{flag} {text!r} is not a time: write for instance 500us, 2ms or 0.1s")
    return float(match["number"]) * _SECONDS[match["unit"]]


def parse_chances(text: str, flag: str) -> tuple[float, ...]:
    """Chances such as `0.8,0.6,0.4`, one for each drafted position.

    Raises:
        BadInput: one is no number between 0 and 1; names the flag.
    """
    chances = []
    for part in text.split(","):
        try:
            chance = float(part)
        except ValueError:
            chance = -1.0
        if not 0 <= chance <= 1:
            raise BadInput(
                f"{flag} {text!r}: {part.strip()!r} is not a chance between 0 and 1; write one for "
                "each drafted position, for instance 0.8,0.6,0.4"
            )
        chances.append(chance)
    return tuple(chances)
