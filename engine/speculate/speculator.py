"""Drafts for the requests that decode, between two steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from engine.batch import Batch, BatchResult
from engine.config import EngineConfig
from engine.request import Request
from engine.speculate.draft_lengths import DraftLengths
from engine.speculate.proposer import ChainProposer, Proposer


class Speculator:
    """Who drafts, and how much of it is verified.

    Args:
        proposer: drafts.
        lengths: says how many tokens pay.
        clock: seconds.
    """

    def __init__(
        self, proposer: Proposer, lengths: DraftLengths, clock: Callable[[], float]
    ) -> None:
        self.proposer = proposer
        self.lengths = lengths
        self._chains = proposer if isinstance(proposer, ChainProposer) else None
        self._clock = clock
        self._prepared = self._observed = 0.0

    def prepare(self, running: Sequence[Request], config: EngineConfig) -> float:
        """Draft for the running requests that decode; returns the seconds that it took.

        Each one's `draft` is set, to None where nothing is to be verified.
        """
        start = self._clock()
        # All that the step took between two choices, the host's work on its outcome included; not
        # if the engine waited for requests.
        if 0.0 < start - self._observed < self._observed - self._prepared:
            self.lengths.took(start - self._prepared)
        requests = [r for r in running if len(r.token_ids) - r.num_computed_tokens == 1]
        for request in requests:
            request.draft = None
        if requests:
            limits = self.lengths.limits(requests, config)
            if any(limits):
                if self._chains is not None:
                    self._chains.floor = self.lengths.floor
                drafts = self.proposer.propose(requests, limits)
                kept = self.lengths.keep(requests, drafts, config, self._clock() - start)
                for request, draft, count in zip(requests, drafts, kept, strict=True):
                    request.draft = draft.first(count) if draft is not None and count else None
        self._prepared = self._clock()
        return self._prepared - start

    def observe(self, batch: Batch, result: BatchResult) -> None:
        """Take in what became of a step's drafts."""
        self.lengths.observe(batch, result)
        self._observed = self._clock()

    def clear(self) -> None:
        """Forget what was kept of requests that have left."""
        self.proposer.clear()

    def forget(self, request: Request) -> None:
        """A request left."""
        self.lengths.forget(request)
        self.proposer.forget(request)
