"""Which option is the best, and which are worth a look for being cheaper or quicker."""

from __future__ import annotations

import math
from collections.abc import Sequence

from autotune.planning.option import Option
from autotune.planning.options import Objective


def score(option: Option, objective: Objective) -> float:
    """What is to be small: USD per hour, watts, GPUs, or seconds of p95 E2E."""
    found: float | None
    match objective:
        case "cost":
            found = option.usd_per_hour
        case "power":
            found = option.watts
        case "gpus":
            found = option.gpus
        case "latency":
            found = option.latency()
    return math.inf if found is None else float(found)


def ranked(options: Sequence[Option], objective: Objective) -> list[Option]:
    """Feasible ones first by the objective, then those that fit, then the rest; ranks are set."""

    def key(option: Option) -> tuple[int, float, float, str]:
        group = 0 if option.feasible else 1 if option.fits else 2
        if group == 1:
            return group, -(option.probability or 0.0), score(option, objective), _label(option)
        if group == 2:
            return group, float(option.candidate.memory.shortfall_bytes), 0.0, _label(option)
        usd = option.usd_per_hour or math.inf
        return group, score(option, objective), usd, _label(option)

    ordered = sorted(options, key=key)
    for place, option in enumerate(ordered, start=1):
        option.rank = place if option.feasible else None
    return ordered


def frontier(options: Sequence[Option]) -> list[int]:
    """Indices of the feasible options of which no other is cheaper and as quick (p95 of E2E)."""
    points = [
        (option.usd_per_hour, option.latency(), index)
        for index, option in enumerate(options)
        if option.feasible
    ]
    known = sorted((u, s, i) for u, s, i in points if u is not None and s is not None)
    kept, best = [], math.inf
    for _, seconds, index in known:
        if seconds < best:
            kept.append(index)
            best = seconds
    return kept


def set_break_even(options: Sequence[Option]) -> None:
    """The price of a GPU-hour at which an option costs as much as the best on another GPU."""
    feasible = [o for o in options if o.feasible and o.usd_per_hour is not None]
    for option in feasible:
        name = option.candidate.choice.gpu.name
        others = [
            o.usd_per_hour
            for o in feasible
            if o.candidate.choice.gpu.name != name and o.usd_per_hour is not None
        ]
        if others and option.gpus:
            option.break_even = min(others) / option.gpus


def _label(option: Option) -> str:
    choice = option.candidate.choice
    return f"{choice.gpu.name} {choice.ranks:03d} {choice.quantization}"
