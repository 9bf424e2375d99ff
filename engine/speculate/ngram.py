"""Prompt lookup: the last tokens occurred before, and what followed them then is drafted.

The rule is that of Saxena 2023 (prompt lookup decoding) and vLLM's `ngram`: the longest run of last
tokens that occurs earlier wins. Of its occurrences the latest is taken, which agrees with what a
text is about now; vLLM takes the earliest. Where the draft outruns the text it is copied from, it
goes on with its own beginning, as an LZ77 copy does: a loop is drafted as a loop.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.config import EngineConfig
from engine.request import Request
from engine.speculate.draft import Draft
from engine.speculate.token_buffer import TokenBuffer

# Tokens that are compared at first, from the end backwards, then eight times as many and so on: a
# match of full length spares the rest, which bounds the work where a text goes round in a loop.
_FIRST_STRETCH = 1024
_NOWHERE = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Lookup:
    """Which last tokens are looked up, and where.

    Args:
        shortest: fewest last tokens that must occur before.
        longest: most last tokens that are compared.
        window: tokens before the last that are searched; 0 searches all.
    """

    shortest: int
    longest: int
    window: int = 0

    @staticmethod
    def of(config: EngineConfig) -> Lookup:
        """What the knobs say."""
        return Lookup(
            config.prompt_lookup_min, config.prompt_lookup_max, config.prompt_lookup_window
        )


def latest_match(tokens: NDArray[np.int32], lookup: Lookup) -> int | None:
    """Where that begins which followed the latest earlier occurrence of the longest known ending.

    tokens: int32 [n]. The occurrence may overlap the ending, and lies in the window as a whole.
    """
    ends = longest_matches(tokens, lookup)[1]
    return int(ends[-1]) + 1 if len(ends) else None


def longest_matches(tokens: NDArray[np.int32], lookup: Lookup) -> tuple[int, NDArray[np.int64]]:
    """The length of the longest known ending, and the places of its occurrences' last tokens.

    The places rise. Of an ending of full length those far back may be left out.
    """
    last = len(tokens) - 1
    begin = 0 if lookup.window == 0 else max(0, last - lookup.window)
    at_once = min(lookup.shortest, 2)  # of these no places are made: most are wrong
    best, found = lookup.shortest - 1, _NOWHERE
    end, stretch = last, _FIRST_STRETCH
    while end - begin > best:
        start = max(begin + at_once - 1, end - stretch)
        equal = tokens[start:end] == tokens[last]
        if at_once == 2:
            equal &= tokens[start - 1 : end - 1] == tokens[last - 1]
        places = equal.nonzero()[0]
        places += start
        length = at_once
        while len(places):
            if length > best:
                best, found = length, places
                if best == lookup.longest:
                    return best, found
            places = places[places >= begin + length]
            places = places[tokens[places - length] == tokens[last - length]]
            length += 1
        end, stretch = start, 8 * stretch
    return best, found


def continuation(tokens: NDArray[np.int32], match: int, count: int) -> list[int]:
    """The `count` tokens that are drafted where `match` is what `latest_match` found."""
    copied: list[int] = tokens[match : match + count].tolist()
    while len(copied) < count:
        copied += copied[: count - len(copied)]
    return copied


class LookupProposer(ABC):
    """Drafts from tokens that are at hand: a `Proposer` that takes next to no time."""

    costs_device = False

    def __init__(self, config: EngineConfig) -> None:
        self._lookup = Lookup.of(config)
        self._buffers: dict[Request, TokenBuffer] = {}

    def reconfigure(self, config: EngineConfig) -> None:
        """Take over changed `live` knobs."""
        self._lookup = Lookup.of(config)

    def propose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[Draft | None]:
        """See `Proposer`."""
        drafts: list[Draft | None] = []
        for request, limit in zip(requests, limits, strict=True):
            draft = None
            if limit > 0:
                buffer = self._buffers.get(request)
                if buffer is None:
                    buffer = self._buffers[request] = TokenBuffer()
                draft = self._draft(buffer.upto(request.token_ids), limit)
            drafts.append(draft)
        return drafts

    def clear(self) -> None:
        """See `Proposer`."""
        self._buffers.clear()

    def forget(self, request: Request) -> None:
        """See `Proposer`."""
        self._buffers.pop(request, None)

    @abstractmethod
    def _draft(self, tokens: NDArray[np.int32], limit: int) -> Draft | None:
        """At most `limit` tokens to follow a request's own, int32 [n]."""


class NgramProposer(LookupProposer):
    """Drafts from each request's own prompt and output."""

    def _draft(self, tokens: NDArray[np.int32], limit: int) -> Draft | None:
        match = latest_match(tokens, self._lookup)
        return None if match is None else Draft(continuation(tokens, match, limit))
