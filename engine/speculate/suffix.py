"""Suffix reuse: what followed the last tokens before, here or in recent outputs of other requests.

As in SuffixDecoding (Oliaro et al. 2024, arXiv 2411.04975), an answer that repeats others is
drafted from them. The longest known ending wins, in the request's own text before others' where
they are equal; of its occurrences those are followed that most agree.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.config import EngineConfig
from engine.request import Request, RequestState
from engine.speculate.draft import Draft
from engine.speculate.ngram import LookupProposer, longest_matches
from engine.speculate.recent_outputs import END, RecentOutputs

# Tokens of others' outputs that are remembered, at least.
_REMEMBERED = 1 << 16
# Of the occurrences so many of the latest are followed.
_MOST_FOLLOWED = 16
# An occurrence of n tokens is followed by the same token about as often as not if n is 2, in nine
# of ten cases if n is 16: as if something new had been seen 2 / n times beside it. Measured on
# text, code, continuations that a model chose and drew, and answers that repeat one another.
_NOVELTY = 2.0


class SuffixProposer(LookupProposer):
    """Drafts from each request's own tokens, and from what requests that left have generated.

    Others' outputs are looked up by two tokens at least, and not if `prompt_lookup_max` is 1.
    """

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self._others = RecentOutputs(_REMEMBERED)

    def clear(self) -> None:
        """See `Proposer`."""
        self._others = RecentOutputs(_REMEMBERED)

    def forget(self, request: Request) -> None:
        """See `Proposer`; of a request that has finished the output is remembered for others."""
        super().forget(request)
        if request.state is RequestState.FINISHED:
            self._others.add(request.output_token_ids)

    def _draft(self, tokens: NDArray[np.int32], limit: int) -> Draft | None:
        lookup = self._lookup
        length, ends = longest_matches(tokens, lookup)
        source = None
        if max(1, length) < lookup.longest:
            for array, places in self._others.occurrences(tokens):
                found, places = _longest(tokens, array, places, lookup.longest)
                if found > length and found >= lookup.shortest:
                    length, ends, source = found, places, array
        if not len(ends):
            return None
        ends = ends[-_MOST_FOLLOWED:]
        after = np.arange(1, limit + 1)
        if source is not None:
            places = np.minimum(ends[:, None] + after, len(source) - 1)
            return _agreed(source[places].tolist(), length)
        # Behind the end of the text comes again what followed the occurrence: see `continuation`.
        periods = (len(tokens) - 1 - ends)[:, None]
        places = ends[:, None] + 1 + (after - 1) % periods
        return _agreed(tokens[places].tolist(), length)


def _longest(
    tokens: NDArray[np.int32], array: NDArray[np.int32], ends: NDArray[np.int64], longest: int
) -> tuple[int, NDArray[np.int64]]:
    """How many of the last tokens occur at most at the ends of pairs in the array, and where."""
    length, last = 2, len(tokens) - 1
    while length < min(longest, len(tokens)):
        further = ends[ends >= length]
        further = further[array[further - length] == tokens[last - length]]
        if not len(further):
            break
        ends = further
        length += 1
    return length, ends


def _agreed(rows: list[list[int]], known: int) -> Draft | None:
    """The draft that most rows agree on, step by step; the latest row, which is last, wins ties.

    The chances are those of an estimate by counts that leaves room for what is new, the more the
    fewer tokens are `known` to be equal (as escapes do in prediction by partial matching).
    """
    token_ids: list[int] = []
    chances: list[float] = []
    chance = 1.0
    for i in range(len(rows[0])):
        counts: dict[int, int] = {}
        for row in reversed(rows):
            counts[row[i]] = counts.get(row[i], 0) + 1
        votes = len(rows) - counts.pop(END, 0)  # an output that was cut off says nothing
        if not votes:
            break
        token = max(counts, key=counts.__getitem__)
        chance *= counts[token] / (votes + _NOVELTY / (known + i))
        token_ids.append(token)
        chances.append(chance)
        if counts[token] < len(rows):
            rows = [row for row in rows if row[i] == token]
    return Draft(token_ids, chances=chances) if token_ids else None
