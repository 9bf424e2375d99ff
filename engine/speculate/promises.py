"""What was promised of the drafts that were chosen, and what came of them.

Whoever is chosen from many because its chance seems high has been lucky more often than not: the
more there are to choose from, the less of the promise is kept.
"""

from __future__ import annotations

# Tokens that a promise has to be broken by for half of that to be believed.
_WEIGHT = 10.0
# What is left of a memory after each step: what was promised of the first tokens of some requests
# says little of their later ones, and where nothing is promised nothing else would tell.
_KEPT = 0.98


class Promises:
    """Promised and accepted tokens of steps, by the number of sequences in powers of two."""

    def __init__(self) -> None:
        self._sums: dict[int, tuple[float, float]] = {}
        self._open: tuple[int, int, float] | None = None

    def factor(self, num_sequences: int) -> float:
        """By what chances are to be multiplied; at most 1."""
        promised, accepted = self._sums.get(num_sequences.bit_length(), (0.0, 0.0))
        return min(1.0, (accepted + _WEIGHT) / (promised + _WEIGHT))

    def promise(self, num_sequences: int, num_drafted: int, accepted: float) -> None:
        """The next step verifies so many tokens, of which `accepted` are expected to be."""
        factor = self.factor(num_sequences)
        self._open = (num_sequences, num_drafted, accepted / factor)
        if not num_drafted:
            self._add(num_sequences, 0.0, 0.0)

    def observe(self, num_sequences: int, num_drafted: int, accepted: int) -> None:
        """What the step came to; one that verified something else tells nothing."""
        if self._open is None:
            return
        sequences, drafted, promised = self._open
        self._open = None
        if drafted and (sequences, drafted) == (num_sequences, num_drafted):
            self._add(sequences, promised, accepted)

    def _add(self, num_sequences: int, promised: float, accepted: float) -> None:
        key = num_sequences.bit_length()
        before = self._sums.get(key, (0.0, 0.0))
        self._sums[key] = before[0] * _KEPT + promised, before[1] * _KEPT + accepted
