"""Steps without drafts now and then, to know what these would take as well.

What drafting gains is told by two costs. Where every step has drafts, the one without would be what
it was when it was last run, with shorter contexts or on a busier machine. Where a model drafts, a
step right behind its own finds the processor's caches full of that model, and is not one of these.
"""

from __future__ import annotations

# Steps with drafts before the first one without, which double up to the second number.
_FIRST, _MOST = 8, 256


class ControlSteps:
    """Counts steps with drafts, by the number of sequences in powers of two."""

    def __init__(self) -> None:
        self._passed: dict[int, int] = {}
        self._wait: dict[int, int] = {}

    def due(self, num_sequences: int) -> bool:
        """Whether the next step is to go without drafts."""
        key = num_sequences.bit_length()
        return self._passed.get(key, 0) >= self._wait.get(key, _FIRST)

    def observe(self, num_sequences: int, num_drafted: int) -> None:
        """A step without prompts was run."""
        key = num_sequences.bit_length()
        if num_drafted:
            self._passed[key] = self._passed.get(key, 0) + 1
        elif self.due(num_sequences):
            self._wait[key] = min(2 * self._wait.get(key, _FIRST), _MOST)
            self._passed[key] = 0
        else:
            self._passed[key] = 0
