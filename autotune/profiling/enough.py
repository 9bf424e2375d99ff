"""How much evidence a statement needs, and the sentence that says it is not there."""

from __future__ import annotations

import re
from collections.abc import Iterable

# A phase of fewer steps is a coincidence of when prompts came; a statistic of fewer requests has
# no 95th percentile.
LEAST_STEPS = 20
LEAST_REQUESTS = 20
# Why nothing is known of the wait before a request ran.
NOT_TOLD = "no record says when a request first ran, which those of an earlier release lack"
_LACKING = re.compile(r"(?P<what>.+) (?P<shortage>needs at least \d+ \w+; has \d+)")


def lacking(what: str, unit: str, least: int, have: int) -> str:
    """Why something is missing from a profile: "… needs at least N requests; has M"."""
    return f"{what} needs at least {least} {unit}; has {have}"


def shortage(sentence: str) -> str | None:
    """The part of a sentence of `lacking` that tells how much is missing; None of other ones."""
    match = _LACKING.fullmatch(sentence)
    return None if match is None else match["shortage"]


def told_once(sentences: Iterable[str]) -> list[str]:
    """The same sentences, with all that lacks the same evidence in one of them."""
    grouped: dict[str, list[str]] = {}
    for sentence in sentences:
        match = _LACKING.fullmatch(sentence)
        whats = grouped.setdefault(sentence if match is None else match["shortage"], [])
        if match is not None:
            whats.append(match["what"])
    told = []
    for text, whats in grouped.items():
        if len(whats) > 1:
            told.append(f"{text}: {', '.join(whats)}")
        else:
            told.append(" ".join([*whats, text]))
    return told
