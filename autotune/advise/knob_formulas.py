"""Named formulas of the technique table that give values of a knob, from a profile.

Each takes the knob's name and `by`, what its guess is multiplied by for further values; none where
a fact is lacking.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from autotune.advise.facts import Facts
from engine.config import KNOBS

KnobFormula = Callable[..., list[float]]
KNOB_FORMULAS: dict[str, KnobFormula] = {}
# Mean share of the seats that may be taken before waiting for one grows long.
_BUSIEST = 0.8
# Of free memory the rest is left to others.
_OF_FREE = 0.8


def _knob_formula(function: KnobFormula) -> KnobFormula:
    KNOB_FORMULAS[function.__name__] = function
    return function


@_knob_formula
def times(facts: Facts, *, knob: str, by: list[float]) -> list[float]:
    """Multiples of the knob's present value."""
    now = facts.number(f"config.{knob}")
    if now is None:
        now = _default(facts, knob)
    return [] if now is None else [now * factor for factor in by]


@_knob_formula
def in_free_memory(facts: Facts, *, knob: str, by: list[float]) -> list[float]:
    """Multiples of the knob's present bytes whose growth takes at most most of the free memory."""
    available = ((facts.profile.hardware or {}).get("memory") or {}).get("available_bytes")
    values = times(facts, knob=knob, by=[1.0, *by])
    if available is None or not values:
        return []
    now, *larger = values
    return [value for value in larger if value - now <= _OF_FREE * available]


@_knob_formula
def seats_for_demand(facts: Facts, *, knob: str, by: list[float]) -> list[float]:
    """Seats for the most requests that were in the engine at once, times each of `by`."""
    queueing = facts.profile.queueing
    if queueing.running_max is None or queueing.queue_max is None:
        return times(facts, knob=knob, by=[2, 4])
    wanted = float(queueing.running_max + queueing.queue_max)
    now = facts.number(f"config.{knob}") or 0.0
    return [_power_of_two(max(wanted * factor, now * 1.01)) for factor in by]


@_knob_formula
def seats_for_tpot(facts: Facts, *, knob: str, by: list[float]) -> list[float]:
    """Seats below the most that ran at once, times each of `by`; as TPOT's limit asks, if any.

    A step's time grows at most in proportion to its sequences, so the limit over the measured
    statistic is a share of them that surely suffices. Where the engine keeps up, no fewer than keep
    up: steps of fewer sequences take little less time, so that by Little's law the mean number that
    runs now has to find a seat, and a queue that is not to grow takes some to spare.
    """
    del knob
    queueing = facts.profile.queueing
    running = queueing.running_max
    if running is None:
        return []
    keeps_up = queueing.utilisation is None or queueing.utilisation < 1
    least = math.ceil((queueing.running_mean or 0.0) / _BUSIEST) if keeps_up else 1
    share = 0.5
    metrics = facts.profile.metrics or {}
    for limit in facts.slo.limits:
        if limit.metric == "tpot":
            measured = (metrics.get("tpot") or {}).get(limit.statistic or "p95")
            if measured and measured > limit.bound:
                share = max(0.1, limit.bound / measured)
    values = [max(1, least, math.floor(running * share * factor)) for factor in by]
    return [float(value) for value in values if value < running]


@_knob_formula
def seats_that_fit(facts: Facts, *, knob: str, by: list[float]) -> list[float]:
    """Seats for as many mean requests as the cache holds at once, times each of `by`."""
    del knob
    seats = facts.profile.kv.seats
    return [] if seats is None else [max(1.0, math.floor(seats * factor)) for factor in by]


@_knob_formula
def queue_within_limit(facts: Facts, *, knob: str, by: list[float]) -> list[float]:
    """Waiting requests that still meet the limit on TTFT: completions a second times its bound.

    Little's law, N = rate * time, over the time that the limit leaves for waiting.
    """
    del knob
    metrics = facts.profile.metrics or {}
    bound = next((limit.bound for limit in facts.slo.limits if limit.metric == "ttft"), None)
    rate = metrics.get("requests_per_s")
    if bound is None or not rate:
        return []
    return [max(1.0, math.floor(rate * bound * factor)) for factor in by]


@_knob_formula
def all_cores(facts: Facts, *, knob: str, by: list[float]) -> list[float]:
    """Every core that the process may use, if fewer are set."""
    del by
    now, here = facts.number(f"config.{knob}"), facts.number("cores")
    return [here] if now is not None and here is not None and now < here else []


def _default(facts: Facts, knob: str) -> float | None:
    if knob == "kv_cache_memory_bytes":
        return facts.profile.kv.total_bytes
    default = KNOBS[knob].default
    return float(default) if isinstance(default, (int, float)) else None


def _power_of_two(value: float) -> float:
    return float(2 ** math.ceil(math.log2(max(value, 1.0))))
