"""How long the steps of a run take whose decodes see a token more in each.

While the same sequences decode, what they see grows evenly, so a step's time is made of straight
pieces in the number of cached tokens; many steps are then added up at once.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

# From so many steps on, arrays are faster than a loop; the sums are the same, to the last bit.
_MANY = 32
Floats = npt.NDArray[np.float64]
_NUMBERED: list[Floats] = [np.empty(0), np.empty(0)]


@dataclass(frozen=True)
class DecodeLine:
    """Seconds of a step of decodes alone by the cached tokens that they see together.

    Straight between `tokens`, and beyond the ends as the outermost pieces are.
    """

    tokens: tuple[float, ...]
    seconds: tuple[float, ...]

    @cached_property
    def _slopes(self) -> tuple[float, ...]:
        xs, ys = self.tokens, self.seconds
        if len(xs) == 1:
            return (0.0,)
        return tuple((ys[i + 1] - ys[i]) / (xs[i + 1] - xs[i]) for i in range(len(xs) - 1))

    def at(self, tokens: float) -> float:
        """Seconds of a step."""
        piece = self._piece(tokens)
        return self.seconds[piece] + self._slopes[piece] * (tokens - self.tokens[piece])

    def ends(
        self,
        start: float,
        tokens: float,
        each: int,
        steps: int,
        *,
        until: float = math.inf,
        scale: float = 1.0,
        gap: float = 0.0,
    ) -> list[float]:
        """When the step after each of the next ones can begin; the first begins at `start`.

        Args:
            start: seconds.
            tokens: cached tokens that the first step's decodes see together.
            each: by how many they see more in each further step.
            steps: at most so many.
            until: no step begins at or after it, but for the first.
            scale: factor on a step's time.
            gap: seconds between a step and the next.
        """
        ends: list[float] = []
        now, seen = start, tokens
        while steps > 0 and (now < until or not ends):
            piece = self._piece(seen)
            slope = self._slopes[piece]
            first = scale * (self.seconds[piece] + slope * (seen - self.tokens[piece])) + gap
            more = scale * slope * each
            count = min(steps, self._steps_within(piece, seen, each))
            if until < math.inf:
                count = _steps_before(until - now, first, more, count)
            if count >= _MANY:
                n, before = _counts(count)
                ends += (now + n * first + more * before).tolist()
            elif more:
                ends += [now + n * first + more * (n * (n - 1) // 2) for n in range(1, count + 1)]
            else:
                ends += [now + n * first for n in range(1, count + 1)]
            now, seen = ends[-1], seen + count * each
            steps -= count
        return ends

    def _piece(self, tokens: float) -> int:
        last = len(self.tokens) - 2
        return min(max(bisect_right(self.tokens, tokens) - 1, 0), last) if last > 0 else 0

    def _steps_within(self, piece: int, tokens: float, each: int) -> int:
        """Steps until the next piece begins; at least 1."""
        if piece >= len(self.tokens) - 2 or each <= 0:
            return 1 << 40
        return max(1, math.ceil((self.tokens[piece + 1] - tokens) / each))


def _counts(most: int) -> tuple[Floats, Floats]:
    """The numbers n from 1 to `most`, and n * (n - 1) / 2 of each."""
    if most > len(_NUMBERED[0]):
        n = np.arange(1, 2 * most + 1, dtype=np.float64)
        _NUMBERED[:] = [n, n * (n - 1) / 2]
    return _NUMBERED[0][:most], _NUMBERED[1][:most]


def _steps_before(span: float, first: float, more: float, most: int) -> int:
    """How many steps begin before `span` seconds have passed, between 1 and `most`.

    Step n, counted from 0, begins after n * first + more * n * (n - 1) / 2 seconds.
    """
    last = most - 1
    if _begins(last, first, more) < span:
        return most
    if more > 0:
        half = first - more / 2
        count = math.ceil((math.sqrt(half * half + 2 * more * max(span, 0.0)) - half) / more)
    else:
        count = math.ceil(span / first)
    count = min(max(1, count), most)
    while count > 1 and _begins(count - 1, first, more) >= span:  # the formulas round
        count -= 1
    while count < most and _begins(count, first, more) < span:
        count += 1
    return count


def _begins(n: int, first: float, more: float) -> float:
    return n * first + more * (n * (n - 1) // 2)
