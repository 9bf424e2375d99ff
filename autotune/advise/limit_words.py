"""The quantity of a limit in the words of its unit."""

from __future__ import annotations

import math

from autotune.diagnose.sentences import number, percent, seconds
from autotune.slo_grammar import LATENCIES, Limit


def told(limit: Limit, value: float) -> str:
    """A value in the unit of the limit's bound."""
    if limit.metric in LATENCIES:
        return seconds(value) if math.isfinite(value) else "no end"
    if limit.metric == "throughput":
        return f"{number(value)} tok/s"
    return percent(value)


def quantity(limit: Limit) -> str:
    """What is limited, as `p95 of ttft`."""
    return f"{limit.statistic} of {limit.metric}" if limit.statistic else limit.metric


def rounded_outward(limit: Limit, value: float) -> float:
    """Two digits of a value, rounded so that a limit there is no harder than at the value."""
    if value <= 0 or not math.isfinite(value):
        return value
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    whole = value / step
    up = limit.operator in ("<", "<=")
    # What is a whole number but for its last bit stays.
    near = round(whole)
    whole = near if abs(whole - near) < 1e-9 else math.ceil(whole) if up else math.floor(whole)
    return whole * step
