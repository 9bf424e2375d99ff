"""What drafting and verifying cost, as arrays to choose from."""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

import numpy as np

from engine.speculate.acceptance_history import Floats

# Uses of a curve after which it is asked for again: costs that are measured go on changing.
REFRESH = 16


class SpeculationCosts(Protocol):
    """What the steps of an engine cost."""

    def verify_seconds(self, num_sequences: int, num_tokens: int) -> float:
        """Of a step that decodes `num_sequences` and no prompts.

        `num_tokens` in all: the last one of each sequence, and the drafted ones.
        """
        ...

    def draft_seconds(self, num_sequences: int, num_drafted: int) -> float:
        """Of drafting up to `num_drafted` tokens for each of `num_sequences`."""
        ...

    def catch_up_seconds(self, num_tokens: int) -> float:
        """Of computing so many tokens that a proposer lacks before it can draft."""
        ...


class CostCurves:
    """Costs at many sizes, asked for at a few and interpolated, as asking takes time.

    Those of few tokens are asked for one by one: kernels take them in tiles, so that one more may
    cost much or nothing.
    """

    def __init__(self, costs: SpeculationCosts) -> None:
        self._costs = costs
        self._verify: dict[int, tuple[int, Floats]] = {}
        self._draft: dict[tuple[int, int], tuple[int, Floats]] = {}
        self._conceivable: dict[tuple[int, int], tuple[int, bool]] = {}

    def verify(self, num_sequences: int, most: int) -> Floats:
        """Seconds of a step with 0, 1, ... `most` drafted tokens; float64 [most + 1]."""
        uses, curve = self._verify.get(num_sequences, (0, None))
        if curve is None or not uses or len(curve) <= most:
            costs, n = self._costs, num_sequences
            sizes = sorted({*ladder(most), *range(min(most + 1, 33 - n))})
            seconds = [costs.verify_seconds(n, n + size) for size in sizes]
            curve = np.interp(np.arange(most + 1), sizes, seconds)
            # No drafts take no longer than some, whatever noise says: their steps would not be run.
            curve[0] = curve.min()
            uses = REFRESH
        self._verify[num_sequences] = uses - 1, curve
        return curve[: most + 1]

    def conceivable(self, num_sequences: int, most: int, budget: int, gain: float) -> bool:
        """Whether some drafts of up to `most` tokens for each would pay if all were accepted.

        A step has at most `budget` tokens; `gain` is what they have to yield, in relation to none.
        """
        n = num_sequences
        uses, pays = self._conceivable.get((n, most), (0, False))
        if not uses:
            uses = REFRESH
            room = min(n * most, budget - n)
            seconds = self.verify(n, max(0, room))
            tokens = np.arange(n, n + len(seconds))
            pays = bool((tokens * seconds[0] > n * gain * seconds).any())
        self._conceivable[n, most] = uses - 1, pays
        return pays

    def draft(self, num_sequences: int, num_drafted: int) -> Floats:
        """Seconds of drafting so many tokens for each of 0, 1, ... `num_sequences`."""
        key = num_sequences, num_drafted
        uses, curve = self._draft.get(key, (0, None))
        if curve is None or not uses:
            costs = self._costs
            sizes = ladder(num_sequences)
            seconds = [costs.draft_seconds(size, num_drafted) if size else 0.0 for size in sizes]
            curve = np.interp(np.arange(num_sequences + 1), sizes, seconds)
            uses = REFRESH
        self._draft[key] = uses - 1, curve
        return curve


@lru_cache(maxsize=4096)
def ladder(most: int) -> tuple[int, ...]:
    """0, 1, 2, 3, 4, 6, 8, 12, 16, 24 and so on, with `most` at the end."""
    steps = {0, most, *(range(min(most, 4)))}
    power = 4
    while power <= most:
        steps |= {power, min(power + power // 2, most)}
        power *= 2
    return tuple(sorted(steps))
