"""Decodes that yield or compute more than a token a step; prompts that are computed elsewhere.

For what a technique is said to bring on the mean; how drafts of the engine's own fare is told in
`autotune.predict.drafting`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from autotune.predict.step_cost import StepWork
from engine.batch import Batch, ScheduledSequence
from engine.block_groups import BlockGroup
from engine.request import Request

Tokens = Callable[[Request, int, int], Sequence[int]]


class _Cost(Protocol):
    def device_seconds(self, work: StepWork) -> float: ...

    def host_seconds(self, work: StepWork) -> float: ...


@dataclass(frozen=True, slots=True)
class Decoding:
    """How decodes differ from one token a sequence and step, and prompts from running here.

    `tokens_per_step` is what a decode yields on the mean and `verify_tokens` what it computes
    (speculation). `prompt_share` is the part of a prompt's time that is spent in these steps; the
    rest is spent before, one prompt after another, on a device of the same speed (disaggregation).
    """

    tokens_per_step: float = 1.0
    verify_tokens: float = 1.0
    prompt_share: float = 1.0

    @property
    def is_plain(self) -> bool:
        """Whether steps cost what their batches cost."""
        return self == PLAIN


PLAIN = Decoding()


class DecodingPlay:
    """What the steps of one engine cost and yield under a `Decoding`."""

    def __init__(self, decoding: Decoding) -> None:
        self._decoding = decoding
        # Of each request, the tokens it is owed beyond whole ones, and what its last step yielded.
        self._owed: dict[str, float] = {}
        self._yielded: dict[str, int] = {}

    def seconds(
        self, batch: Batch, cost: _Cost, groups: Sequence[BlockGroup]
    ) -> tuple[float, float]:
        """Seconds of a batch on the device and on the host."""
        how = self._decoding
        decodes: list[ScheduledSequence] = []
        chunks: list[ScheduledSequence] = []
        for place, s in enumerate(batch.sequences):
            # The tokens that a step yielded come back as one chunk; the factors tell what computing
            # them costs.
            if place < batch.num_decodes and s.start >= s.request.num_prompt_tokens:
                decodes.append(s)
            elif self._is_decode(s):
                decodes.append(ScheduledSequence(s.request, s.end - 1, 1, True))
            else:
                chunks.append(s)
        whole = self._work([*decodes, *chunks], len(decodes), groups)
        device = cost.device_seconds(whole)
        if chunks and how.prompt_share < 1:
            alone = (
                cost.device_seconds(self._work(decodes, len(decodes), groups)) if decodes else 0.0
            )
            device = alone + how.prompt_share * max(0.0, device - alone)
        return device, cost.host_seconds(whole)

    def tokens(self, batch: Batch, tokens_of: Tokens) -> list[list[int]]:
        """As many tokens for each decode as it yields, and one for each prompt."""
        rows = []
        for s in batch.sequences:
            count = 1 if s.samples else 0
            request = s.request
            if s.samples and s.start >= request.num_prompt_tokens:
                count = self._yield(request.request_id)
            if s.samples:
                self._yielded[request.request_id] = count
            rows.append(list(tokens_of(request, request.num_output_tokens, count)))
        return rows

    def _yield(self, request_id: str) -> int:
        owed = self._owed.get(request_id, 0.0) + self._decoding.tokens_per_step
        count = max(1, int(owed))
        self._owed[request_id] = owed - count
        return count

    def _work(
        self,
        sequences: list[ScheduledSequence],
        num_decodes: int,
        groups: Sequence[BlockGroup],
    ) -> StepWork:
        work = StepWork.of_batch(Batch(sequences, num_decodes), groups)
        return work.verifying(self._decoding.verify_tokens)

    def _is_decode(self, sequence: ScheduledSequence) -> bool:
        return (
            sequence.start >= sequence.request.num_prompt_tokens
            and self._yielded.get(sequence.request.request_id) == sequence.num_tokens
        )
