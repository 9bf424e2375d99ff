"""What lies between steps and before them: the load generator's times, from the records."""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from autotune.profiling.evidence import LoadEvidence
from engine.step_record import StepRecord

# Of fewer steps or requests a median says little.
_ENOUGH = 5
# Fewer gaps, or gaps after steps of one size alone, tell no slope.
_ENOUGH_FOR_SLOPE = 50
# Longer gaps than this quantile's are moments at which the machine did something else.
_USUAL = 0.995


@dataclass(frozen=True, slots=True)
class LoadTimes:
    """What the load generator and the loop around the engine took, in seconds.

    `gap` lies between the end of a step and the beginning of the next while there is work, and
    `gap_sequence` more of it for each sequence of the step: its token is detokenised, stamped and
    handed out. `arrival` lies between the intended send and the step that sees the request while
    the engine idles.
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
    return times_of(step_gaps(evidence.steps), list(idle_waits(evidence)))


def times_of(gaps: Sequence[tuple[int, float]], waits: Sequence[float]) -> LoadTimes:
    """The same from gaps, as (sequences of the step before, seconds), and from waits in seconds."""
    gap, slope = _gap_line(gaps)
    arrival = max(0.0, statistics.median(waits)) if len(waits) >= _ENOUGH else 0.0
    return LoadTimes(gap, arrival, slope)


def step_gaps(steps: Sequence[StepRecord]) -> list[tuple[int, float]]:
    """Sequences of each step that another followed at once, and seconds until that one began."""
    # A step with decodes goes on from one before it: nothing was waited for.
    return [
        (
            before.decode_sequences + before.prefill_sequences,
            after.start - (before.start + before.seconds),
        )
        for before, after in pairwise(steps)
        if after.decode_sequences
    ]


def idle_waits(evidence: LoadEvidence) -> Iterator[float]:
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


def _gap_line(gaps: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Seconds whatever the step, and seconds a sequence; neither is below 0."""
    if len(gaps) < _ENOUGH:
        return 0.0, 0.0
    sequences, seconds = np.array(gaps, dtype=float).T
    middle = max(0.0, float(np.median(seconds)))
    seconds = np.minimum(seconds, np.quantile(seconds, _USUAL))
    mean, spread = sequences.mean(), sequences - sequences.mean()
    squares = float(spread @ spread)
    if len(gaps) < _ENOUGH_FOR_SLOPE or squares <= 0:
        return middle, 0.0
    slope = max(0.0, float(spread @ seconds) / squares)
    constant = float(seconds.mean()) - slope * float(mean)
    if constant < 0:  # through the origin, then
        return 0.0, max(0.0, float(sequences @ seconds) / float(sequences @ sequences))
    return constant, slope
