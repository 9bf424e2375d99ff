"""What lies between steps and before them: the load generator's times, from the records."""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from autotune.profiling.evidence import LoadEvidence

# Of fewer steps or requests a median says little.
_ENOUGH = 5


@dataclass(frozen=True, slots=True)
class LoadTimes:
    """What the load generator and the loop around the engine took, in seconds.

    `gap` lies between the end of a step and the beginning of the next while there is work, and
    `gap_sequence` more of it for each sequence of the step. `arrival` lies between the intended
    send and the step that sees the request while the engine idles.
    """

    gap: float = 0.0
    arrival: float = 0.0
    gap_sequence: float = 0.0

    def gap_of(self, sequences: int) -> float:
        """Seconds after a step of so many sequences."""
        return self.gap + self.gap_sequence * sequences


NO_TIMES = LoadTimes()


def load_times(evidence: LoadEvidence) -> LoadTimes:
    """How long the loop around the engine takes, from the records."""
    steps = evidence.steps
    # A step with decodes goes on from one before it: nothing was waited for.
    gaps = [
        after.start - (before.start + before.seconds)
        for before, after in pairwise(steps)
        if after.decode_sequences
    ]
    waits = list(_waits_of_an_idle_engine(evidence))
    return LoadTimes(
        max(0.0, statistics.median(gaps)) if len(gaps) >= _ENOUGH else 0.0,
        max(0.0, statistics.median(waits)) if len(waits) >= _ENOUGH else 0.0,
    )


def _waits_of_an_idle_engine(evidence: LoadEvidence) -> Iterator[float]:
    """Seconds from the intended send to the first step, of requests that met an idle engine."""
    steps = evidence.steps
    starts = [step.start for step in steps]
    for record in evidence.requests:
        if record.first_scheduled is None:
            continue
        # The seat is given a little after the step's start.
        index = bisect_right(starts, record.first_scheduled) - 1
        if index < 0:
            continue
        free = steps[index - 1].start + steps[index - 1].seconds if index else 0.0
        if record.intended_send > free:
            yield steps[index].start - record.intended_send
