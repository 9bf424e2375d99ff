"""What simulated drafts came to, by keys whose numbers can be given bounds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from autotune.speculation_counts import SpeculationTotals
from engine.config import EngineConfig

_SUMS = ("decodes", "drafted_tokens", "accepted_tokens", "draft_seconds", "seconds")


def drafts_together(totals: Sequence[SpeculationTotals]) -> SpeculationTotals:
    """What the drafts of all engines come to."""
    whole = SpeculationTotals()
    for each in totals:
        for name in _SUMS:
            setattr(whole, name, getattr(whole, name) + getattr(each, name))
        for name in ("drafted_by_depth", "accepted_by_depth"):
            both = zip_longest(getattr(whole, name), getattr(each, name), fillvalue=0)
            setattr(whole, name, [a + b for a, b in both])
    return whole


def drafts_told(drafts: SpeculationTotals, config: EngineConfig) -> dict[str, Any] | None:
    """By the keys of `bench --json` under `speculation`, as far as they are single numbers.

    `acceptance` has by position, counted from 1, the share of the drafts that got so far of those
    that were so long. None without speculation.
    """
    if config.speculative_method == "none":
        return None
    deepest = config.num_speculative_tokens
    pairs = zip(drafts.drafted_by_depth, drafts.accepted_by_depth, strict=True)
    shares = {place: right / all_ for place, (all_, right) in enumerate(pairs, 1) if all_}
    decodes, drafted, seconds = drafts.decodes, drafts.drafted_tokens, drafts.seconds
    return {
        "tokens_per_step": drafts.tokens_per_step if decodes else None,
        "verified_tokens": drafted / decodes if decodes else None,
        "hit_share": drafts.drafted_decodes / decodes if decodes else None,
        "acceptance_rate": drafts.accepted_tokens / drafted if drafted else None,
        "draft_time_share": drafts.draft_seconds / seconds if seconds else None,
        "acceptance": {str(place): shares.get(place) for place in range(1, deepest + 1)},
    }
