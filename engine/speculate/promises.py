"""What was promised of the drafts that were chosen, and what came of them.

Whoever is chosen from many because its chance seems high has been lucky more often than not: the
more there are to choose from, the less of the promise is kept.
"""

from __future__ import annotations

# Tokens that a promise has to be broken by for half of that to be believed.
_WEIGHT = 10.0
# What is left of a memory after each step, of whatever size: what was promised of the first tokens
# of some requests says little of their later ones, and what is not drafted tells nothing.
_KEPT = 0.85
# Promised tokens that are remembered, at most: a full batch promises more in a step, and what was
# too high then is known better by the next.
_MOST = 64.0


class Promises:
    """Promised and accepted tokens of steps, by the number of sequences in powers of two."""

    def __init__(self) -> None:
        self._step = 0
        self._sums: dict[int, tuple[int, float, float]] = {}  # of a step, as they were then
        self._open: tuple[int, int, float] | None = None

    def factor(self, num_sequences: int) -> float:
        """By what chances are to be multiplied; at most 1."""
        promised, accepted = self._remembered(num_sequences.bit_length())
        return min(1.0, (accepted + _WEIGHT) / (promised + _WEIGHT))

    def promise(self, num_sequences: int, num_drafted: int, accepted: float) -> None:
        """The next step verifies so many tokens, of which `accepted` are expected to be."""
        self._step += 1
        self._open = (num_sequences, num_drafted, accepted / self.factor(num_sequences))

    def observe(self, num_sequences: int, num_drafted: int, accepted: int) -> None:
        """What the step came to; one that verified something else tells nothing."""
        if self._open is None:
            return
        sequences, drafted, promised = self._open
        self._open = None
        if drafted and (sequences, drafted) == (num_sequences, num_drafted):
            key = num_sequences.bit_length()
            before = self._remembered(key)
            promised += before[0]
            kept = _MOST / max(promised, _MOST)
            self._sums[key] = self._step, kept * promised, kept * (before[1] + accepted)

    def _remembered(self, key: int) -> tuple[float, float]:
        step, promised, accepted = self._sums.get(key, (self._step, 0.0, 0.0))
        kept = _KEPT ** (self._step - step)
        return promised * kept, accepted * kept
