"""A step between its launch and its record, and what of its time was the device's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from engine.attention_work import AttentionWork
from engine.batch import Batch, BatchResult, InFlight
from engine.errors import EngineError
from engine.step_record import StepRecord


@dataclass(slots=True)
class LaunchedStep:
    """A batch on its way, and how things stood when it was scheduled.

    Times are seconds on the engine's clock: `start` is when the step could begin, `launched` when
    its work had been handed over, and `returned` when the engine went back to its caller with the
    step still on its way.
    """

    batch: Batch
    start: float
    scheduler_seconds: float
    queue_length: int
    running: int
    blocks_used: int
    blocks_cached: int
    blocks_total: int
    hit_tokens: int
    work: AttentionWork
    used_tokens: int
    draft_seconds: float = 0.0
    in_flight: InFlight | None = None
    launched: float = 0.0
    returned: float = 0.0

    def idle_seconds(self, asked: float, device_seconds: float) -> float:
        """Time in which the device had finished and the caller had not yet asked for the result.

        It is the caller's own and no part of the step; `asked` is when it came back.
        """
        return max(0.0, asked - max(self.returned, self.launched + device_seconds))

    def record(self, result: BatchResult, end: float, idle_seconds: float) -> StepRecord:
        """The step's evidence; at `end` its last work was done or the next step's began."""
        batch = self.batch
        drafted, accepted = count_by_depth(batch, result)
        elapsed = end - self.start - idle_seconds
        return StepRecord(
            start=self.start,
            prefill_tokens=batch.num_prefill_tokens,
            prefill_sequences=len(batch.sequences) - batch.num_decodes,
            decode_sequences=batch.num_decodes,
            kv_tokens_read=self.work.kv_tokens,
            device_seconds=result.device_seconds,
            # A virtual clock's sums may round below the executor's own account.
            host_seconds=max(result.host_seconds, elapsed - result.device_seconds),
            scheduler_seconds=self.scheduler_seconds,
            queue_length=self.queue_length,
            running=self.running,
            blocks_used=self.blocks_used,
            blocks_cached=self.blocks_cached,
            blocks_total=self.blocks_total,
            preemptions=batch.num_preemptions,
            prefix_hit_tokens=self.hit_tokens,
            drafted_tokens=batch.num_drafted_tokens,
            accepted_tokens=sum(accepted),
            prefill_kv_tokens_read=self.work.prefill_kv_tokens,
            prefill_pairs=self.work.prefill_pairs,
            sampled_sequences=sum([s.samples for s in batch.sequences]),
            communication_seconds=result.communication_seconds,
            used_tokens=self.used_tokens,
            waiting_seconds=result.waiting_seconds,
            drafted_by_depth=drafted,
            accepted_by_depth=accepted,
            draft_seconds=self.draft_seconds,
        )


class LandedStep(NamedTuple):
    """A step whose result the scheduler has; its record and some outputs are yet to be made."""

    step: LaunchedStep
    result: BatchResult
    idle_seconds: float


@dataclass(slots=True)
class Completed:
    """The result of an executor that waits itself."""

    result: BatchResult

    def wait(self) -> BatchResult:
        """The result."""
        return self.result


def count_by_depth(batch: Batch, result: BatchResult) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of each depth of drafts, the sequences that had tokens there and those that accepted one."""
    drafted: list[int] = []
    accepted: list[int] = []
    for sequence, tokens in zip(batch.sequences[: batch.num_decodes], result.tokens, strict=False):
        draft = sequence.draft
        if draft is None:
            continue
        deepest = max(draft.depths())
        while len(drafted) < deepest:
            drafted.append(0)
            accepted.append(0)
        for depth in range(deepest):
            drafted[depth] += 1
            accepted[depth] += depth + 1 < len(tokens)
    return tuple(drafted), tuple(accepted)


def check_result(batch: Batch, result: BatchResult) -> None:
    """Refuse a result that does not answer the batch, before anything is recorded.

    Raises:
        EngineError: a sequence is missing, or one that samples got no token or the reverse.
    """
    if len(result.tokens) != len(batch.sequences):
        raise EngineError(
            f"the executor returned tokens for {len(result.tokens)} of {len(batch.sequences)} "
            "sequences"
        )
    for sequence, tokens in zip(batch.sequences, result.tokens, strict=True):
        if bool(tokens) is not sequence.samples:
            raise EngineError(
                f"the executor returned {len(tokens)} tokens for request "
                f"{sequence.request.request_id!r}, which "
                f"{'samples' if sequence.samples else 'does not sample'} in this step"
            )
        if len(tokens) > sequence.num_drafted + 1:
            raise EngineError(
                f"the executor returned {len(tokens)} tokens for request "
                f"{sequence.request.request_id!r}, of which {sequence.num_drafted} were drafted"
            )
