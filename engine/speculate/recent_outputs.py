"""What requests that left have generated, to be looked up by its last tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

# Of the occurrences of two tokens so many of the latest are compared further.
_MOST_OCCURRENCES = 64
# Stands behind every output; no token is like it.
END = -1


class _Part:
    """Outputs one behind the other, and where each pair of tokens occurs in them."""

    def __init__(self, capacity: int) -> None:
        self.tokens = np.full(capacity, END, dtype=np.int32)
        self.count = 0
        self._ends: dict[tuple[int, int], list[int]] = {}

    def add(self, output: Sequence[int]) -> None:
        first = self.count
        self.tokens[first : first + len(output)] = output
        self.count += len(output) + 1
        ends = self._ends
        for place, pair in enumerate(pairwise(output), first + 1):
            ends.setdefault(pair, []).append(place)

    def ends(self, pair: tuple[int, int]) -> NDArray[np.int64] | None:
        places = self._ends.get(pair)
        return None if places is None else np.array(places[-_MOST_OCCURRENCES:])


class RecentOutputs:
    """The latest outputs, at least `capacity` tokens of them if there were so many, at most twice.

    They are kept in two parts; when one is full the other, which is older, is emptied.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._parts = [_Part(capacity), _Part(capacity)]

    def __len__(self) -> int:
        """Tokens kept, with one behind each output."""
        return sum(part.count for part in self._parts)

    def add(self, output: Sequence[int]) -> None:
        """Keep an output; of one that is too long only its end."""
        output = output[-(self._capacity - 1) :]
        if len(output) < 2:
            return
        if self._parts[0].count + len(output) + 1 > self._capacity:
            self._parts = [_Part(self._capacity), self._parts[0]]
        self._parts[0].add(output)

    def occurrences(
        self, tokens: NDArray[np.int32]
    ) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int64]]]:
        """Where the last two tokens of int32 [n] occur: arrays, and places of the second in them.

        The latest outputs first, places rising; behind each output the array has `END`.
        """
        if len(tokens) < 2:
            return
        pair = (int(tokens[-2]), int(tokens[-1]))
        for part in self._parts:
            places = part.ends(pair)
            if places is not None:
                yield part.tokens, places
