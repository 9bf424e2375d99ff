"""One request of a workload, and the workload as a whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WorkloadRow:
    """One request: when it arrives and how long it is; lengths in tokens, times in seconds.

    `arrival_s` counts from the workload's beginning. `prefix_ids` name the blocks of the prompt's
    beginning, `prefix_block_tokens` tokens each (the last may be partial): two requests share a
    prefix as far as their ids are equal. `prompt` is kept where a trace holds texts; until they
    are tokenised the lengths are estimates. `completion` is the recorded answer, whose length is
    the output's. Requests of one `session_id` are turns of one conversation.
    """

    arrival_s: float
    input_tokens: int
    output_tokens: int
    prompt: str | None = None
    token_ids: tuple[int, ...] | None = None
    prefix_ids: tuple[int, ...] | None = None
    prefix_block_tokens: int | None = None
    session_id: str | None = None
    completion: str | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in the order of their arrival, where they came from, and what was done to them.

    `notes` belong in the report: each says one thing that was left out, assumed or changed.
    """

    rows: tuple[WorkloadRow, ...]
    source: str
    format: str
    notes: tuple[str, ...] = ()

    @property
    def duration_s(self) -> float:
        """Seconds from the first arrival to the last."""
        return self.rows[-1].arrival_s - self.rows[0].arrival_s if self.rows else 0.0

    @property
    def timed(self) -> bool:
        """Whether the rows arrive at different times; a set of prompts does not."""
        return self.duration_s > 0

    @property
    def rate(self) -> float | None:
        """Mean arrivals per second; None without a duration."""
        return mean_rate([row.arrival_s for row in self.rows])

    def with_rows(self, rows: Iterable[WorkloadRow], *notes: str) -> Workload:
        """The same workload with other rows, and notes that say why."""
        return dataclasses.replace(self, rows=tuple(rows), notes=(*self.notes, *notes))


def mean_rate(arrivals: list[float]) -> float | None:
    """Arrivals per second: the number of gaps over their sum; None without a duration.

    Counting gaps, not arrivals, keeps the rate of a slice that begins with an arrival unbiased.
    """
    span = max(arrivals) - min(arrivals) if arrivals else 0.0
    return (len(arrivals) - 1) / span if span > 0 else None
