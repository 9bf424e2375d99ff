"""What the steps of an engine in virtual time come to, and the record of one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from autotune.predict.step_cost import StepWork
from autotune.speculation_counts import SpeculationTotals
from engine.attention_work import attention_work
from engine.batch import Batch, BatchResult
from engine.block_groups import BlockGroup
from engine.launched_step import count_by_depth
from engine.scheduler import Scheduler
from engine.step_record import StepRecord


@dataclass(slots=True)
class StepTotals:
    """What the steps of an engine come to; times in seconds."""

    steps: int = 0
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    prefill_tokens: int = 0
    sequences: int = 0
    device_seconds: float = 0.0
    host_seconds: float = 0.0
    peak_blocks: int = 0
    blocks_total: int = 0
    drafts: SpeculationTotals = field(default_factory=SpeculationTotals)

    def count(self, work: StepWork, device: float, host: float, hit_tokens: int, used: int) -> None:
        """Count a step, during which so many blocks are used; the preemptions before it aside."""
        sequences = work.sequences
        self.steps += 1
        self.prefix_hit_tokens += hit_tokens
        self.prefill_tokens += int(work.prompt_tokens)
        self.sequences += sequences
        self.device_seconds += device
        self.host_seconds += host
        if used > self.peak_blocks:
            self.peak_blocks = used

    def count_drafts(
        self, batch: Batch, result: BatchResult, seconds: float, drafting: float
    ) -> None:
        """Count the drafts of a step, which took some seconds, those of drafting among them."""
        drafted, accepted = count_by_depth(batch, result)
        drafts = self.drafts
        drafts.decodes += batch.num_decodes
        drafts.seconds += seconds
        drafts.draft_seconds += drafting
        if not drafted:
            return
        drafts.drafted_tokens += batch.num_drafted_tokens
        drafts.accepted_tokens += sum(accepted)
        for totals, counts in (
            (drafts.drafted_by_depth, drafted),
            (drafts.accepted_by_depth, accepted),
        ):
            totals += [0] * (len(counts) - len(totals))
            for place, count in enumerate(counts):
                totals[place] += count

    def to_metrics(self) -> dict[str, float | int | None]:
        """By the keys that `bench` has under `engine`."""
        prompts = self.prefix_hit_tokens + self.prefill_tokens
        total = self.device_seconds + self.host_seconds
        return {
            "steps": self.steps,
            "preemptions": self.preemptions,
            "prefix_hit_rate": self.prefix_hit_tokens / prompts if prompts else None,
            "kv_blocks_total": self.blocks_total if self.steps else None,
            "kv_peak_usage": self.peak_blocks / self.blocks_total if self.steps else None,
            "mean_batch": self.sequences / self.steps if self.steps else None,
            "host_share": self.host_seconds / total if total > 0 else None,
            "device_share": self.device_seconds / total if total > 0 else None,
        }


def step_record(
    batch: Batch,
    result: BatchResult,
    start: float,
    drafting: float,
    scheduler: Scheduler,
    groups: Sequence[BlockGroup],
    hit_tokens: int,
) -> StepRecord:
    """The record of a step that was scheduled and is yet to be taken in; times in seconds.

    `drafting` are the seconds on the host beside the result's that went to drafting.
    """
    drafted, accepted = count_by_depth(batch, result)
    pool, running = scheduler.pool, scheduler.running
    work = attention_work(batch, groups, uniform=pool.uniform)
    reserved = sum([r.tables.capacity - r.num_computed_tokens for r in running])
    return StepRecord(
        start=start,
        prefill_tokens=batch.num_prefill_tokens,
        prefill_sequences=len(batch.sequences) - batch.num_decodes,
        decode_sequences=batch.num_decodes,
        kv_tokens_read=work.kv_tokens,
        device_seconds=result.device_seconds,
        host_seconds=result.host_seconds + drafting,
        scheduler_seconds=0.0,
        queue_length=len(scheduler.waiting),
        running=len(running),
        blocks_used=pool.num_used,
        blocks_cached=pool.num_cached,
        blocks_total=pool.num_blocks,
        preemptions=batch.num_preemptions,
        prefix_hit_tokens=hit_tokens,
        drafted_tokens=batch.num_drafted_tokens,
        accepted_tokens=sum(accepted),
        prefill_kv_tokens_read=work.prefill_kv_tokens,
        prefill_pairs=work.prefill_pairs,
        sampled_sequences=sum([s.samples for s in batch.sequences]),
        used_tokens=pool.num_used * pool.block_size - (reserved - batch.num_tokens),
        drafted_by_depth=drafted,
        accepted_by_depth=accepted,
        draft_seconds=drafting,
    )
