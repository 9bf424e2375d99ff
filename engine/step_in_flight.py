"""A step that was handed to the device, and what it comes to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.batch import Batch, BatchResult, ScheduledSequence
from engine.collective_clock import CollectiveSeconds
from engine.parallel import Ranks
from engine.request import TokenLogprobs
from engine.sampler import PendingTokens, SampledTokens
from engine.speculate.accepted import accepted_places
from engine.stopwatch import Stopwatch


@dataclass(frozen=True, slots=True)
class Accepted:
    """The drafted tokens of a sequence that were accepted: their indices in the draft."""

    sequence: ScheduledSequence
    places: list[int]


class StepInFlight:
    """A step on its way.

    Args:
        on_accepted: told once what was accepted of each draft; None if there is none.
    """

    def __init__(
        self,
        batch: Batch,
        pending: PendingTokens | None,
        host_seconds: float,
        stopwatch: Stopwatch,
        ranks: Ranks,
        collectives: CollectiveSeconds | None,
        on_accepted: Callable[[Sequence[Accepted]], None] | None = None,
    ) -> None:
        self._batch = batch
        self._pending = pending
        self._collectives = collectives
        self._host_seconds = host_seconds
        self._stopwatch = stopwatch
        self._ranks = ranks
        self._on_accepted = on_accepted

    def wait(self) -> BatchResult:
        """Wait for the chosen tokens to be on the host; can be called again if interrupted.

        Raises:
            EngineError: a rank is gone.
        """
        sequences = self._batch.sequences
        sampled, device_seconds = self._results()
        tokens: list[list[int]] = [[] for _ in sequences]
        logprobs: list[list[TokenLogprobs] | None] = []
        if sampled is not None:
            if self._on_accepted is None and len(sampled.token_ids) == len(sequences):
                tokens = [[token] for token in sampled.token_ids]
                if sampled.logprobs:
                    logprobs = [None if entry is None else [entry] for entry in sampled.logprobs]
            else:
                logprobs = self._take(sampled, tokens)
        collectives = self._collectives
        return BatchResult(
            tokens=tokens,
            device_seconds=device_seconds,
            host_seconds=self._host_seconds,
            logprobs=logprobs,
            communication_seconds=None if collectives is None else collectives.total,
            waiting_seconds=None if collectives is None else collectives.waiting,
        )

    def _take(
        self, sampled: SampledTokens, tokens: list[list[int]]
    ) -> list[list[TokenLogprobs] | None]:
        """Fill in each sequence's tokens; returns the log-probabilities beside them."""
        logprobs: list[list[TokenLogprobs] | None] = []
        if sampled.logprobs:
            logprobs = [None] * len(tokens)
        accepted: list[Accepted] = []
        row = 0
        for i, sequence in enumerate(self._batch.sequences):
            if not sequence.samples:
                continue
            draft = sequence.draft
            rows = [row]
            if draft is not None:
                chosen = sampled.token_ids[row : row + len(draft) + 1]
                places = accepted_places(draft, chosen)
                rows += [row + 1 + place for place in places]
                accepted.append(Accepted(sequence, places))
            tokens[i] = [sampled.token_ids[r] for r in rows]
            if sampled.logprobs:
                entries = [sampled.logprobs[r] for r in rows]
                if entries[0] is not None:
                    logprobs[i] = [entry for entry in entries if entry is not None]
            row += 1 + sequence.num_drafted
        if self._on_accepted is not None:
            on_accepted, self._on_accepted = self._on_accepted, _told
            on_accepted(accepted)
        return logprobs

    def _results(self) -> tuple[SampledTokens | None, float]:
        try:
            sampled = None if self._pending is None else self._pending.wait()
            seconds = self._stopwatch.seconds()
        except RuntimeError as error:
            self._ranks.check(error)
            raise
        self._ranks.check()
        return sampled, seconds


def _told(_: Sequence[Accepted]) -> None:
    """In the place of who was told already."""
