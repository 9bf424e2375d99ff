"""How often a request has each token, kept as it grows: counting anew costs its length a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class TokenCounts:
    """The distinct tokens of a prompt and its output, and how often each is in the output.

    Args:
        num_prompt_tokens: as many tokens are the prompt, which is not counted.
    """

    def __init__(self, num_prompt_tokens: int) -> None:
        self._num_prompt_tokens = num_prompt_tokens
        self._read = 0
        self._places: dict[int, int] = {}
        self._tokens = np.empty(16, dtype=np.int64)
        self._counts = np.zeros(16, dtype=np.float32)

    def read(self, token_ids: Sequence[int]) -> None:
        """Take in what came since the last time; `token_ids` are all of prompt and output."""
        for position in range(self._read, len(token_ids)):
            self._add(token_ids[position], position >= self._num_prompt_tokens)
        self._read = len(token_ids)

    def copied(self) -> TokenCounts:
        """The same, to go on differently."""
        copy = TokenCounts(self._num_prompt_tokens)
        copy._read, copy._places = self._read, dict(self._places)
        copy._tokens, copy._counts = self._tokens.copy(), self._counts.copy()
        return copy

    def with_drafted(
        self, drafted: Sequence[int] = ()
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Distinct tokens, and how often each is in the output with `drafted` behind it.

        Both [distinct]; not to be changed.
        """
        known = len(self._places)
        tokens, counts = self._tokens[:known], self._counts[:known]
        if not drafted:
            return tokens, counts
        counts = counts.copy()
        more: dict[int, int] = {}
        for token in drafted:
            place = self._places.get(token)
            if place is None:
                more[token] = more.get(token, 0) + 1
            else:
                counts[place] += 1
        if more:
            tokens = np.concatenate([tokens, np.fromiter(more, np.int64, len(more))])
            counts = np.concatenate([counts, np.fromiter(more.values(), np.float32, len(more))])
        return tokens, counts

    def _add(self, token: int, counted: bool) -> None:
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.empty_like(self._tokens)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._tokens[place] = token
        self._counts[place] += counted
