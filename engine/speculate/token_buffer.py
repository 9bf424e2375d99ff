"""A request's tokens as an array that grows with them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class TokenBuffer:
    """Token ids, int32, appended to at a cost that does not depend on how many there are."""

    def __init__(self) -> None:
        self._array = np.empty(0, dtype=np.int32)
        self._count = 0

    def upto(self, token_ids: Sequence[int]) -> NDArray[np.int32]:
        """All of `token_ids` as an array [n], of which only those since the last call are copied.

        The tokens of the call before must still be the first ones. The array is a view that later
        calls leave as it is.
        """
        count, had = len(token_ids), self._count
        if count > len(self._array):
            grown = np.empty(max(2 * len(self._array), count + 256), dtype=np.int32)
            grown[:had] = self._array[:had]
            self._array = grown
        if count - had == 1:
            self._array[had] = token_ids[-1]
        elif count > had:
            self._array[had:count] = token_ids[had:]
        self._count = count
        return self._array[:count]
