"""What another engine told of several rounds, put together as if it were of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from autotune.speculation_counts import SpeculationTotals


def pooled_engine(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`engine` of the metrics of rounds; None for what one of them does not tell.

    What is counted is added up, peaks are the highest, and shares and means are the rounds' mean:
    rounds are equally long.
    """
    pooled: dict[str, Any] = {}
    for name in rounds[0]:
        values = [figures.get(name) for figures in rounds]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            pooled[name] = None
        elif name in ("steps", "preemptions"):
            pooled[name] = sum(known)
        elif name in ("kv_blocks_total", "kv_peak_usage"):
            pooled[name] = max(known)
        else:
            pooled[name] = sum(known) / len(known)
    return pooled


def pooled_speculation(rounds: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """`speculation` of the metrics of rounds; None where none of them drafted."""
    totals = SpeculationTotals()
    told = [figures for figures in rounds if figures is not None]
    for figures in told:
        totals.decodes += figures["decodes"]
        totals.drafted_tokens += figures["drafted_tokens"]
        totals.accepted_tokens += figures["accepted_tokens"]
        for name in ("drafted", "accepted"):
            counts = [position[name] for position in figures["positions"]]
            earlier = getattr(totals, f"{name}_by_depth")
            earlier[:] = [a + b for a, b in zip_longest(earlier, counts, fillvalue=0)]
    return {**totals.to_metrics(), "loads": []} if told else None
