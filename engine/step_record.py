"""The engine's own evidence: one record a step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step did and what it cost; times are seconds on the engine's clock.

    `host_seconds` is everything of the step outside the device's work: scheduling, preparing the
    inputs, updating requests, detokenising. What the host did while the device worked is not
    counted, as it cost no time; so the seconds of consecutive steps add up. `scheduler_seconds` is
    what `Scheduler` took. `kv_tokens_read` counts the cached tokens that each sequence's new ones
    see; where layers have windows, as a mean over the layers. `blocks_used` counts blocks owned by
    requests after the step's allocation; cached blocks that nobody owns are `blocks_cached`.

    `prefill_kv_tokens_read` is the part of `kv_tokens_read` that prompt chunks read,
    `prefill_pairs` the pairs of query and key that they compute, `sampled_sequences` those that got
    a token. `communication_seconds` is the part of `device_seconds` that ranks spent in
    collectives, waiting for each other included, and `waiting_seconds` the part of that beyond
    what collectives take among idle ranks; None where it is not measured. `used_tokens` counts the
    slots of owned blocks that hold a token's keys and values after the step; where layers have
    windows it means nothing.

    `drafted_by_depth[d]` counts the sequences with drafted tokens d + 1 places beyond their last
    one, `accepted_by_depth[d]` those of them that got so many accepted. `draft_seconds` is the part
    of `host_seconds` that went to drafting.
    """

    start: float
    prefill_tokens: int
    prefill_sequences: int
    decode_sequences: int
    kv_tokens_read: int
    device_seconds: float
    host_seconds: float
    scheduler_seconds: float
    queue_length: int
    running: int
    blocks_used: int
    blocks_cached: int
    blocks_total: int
    preemptions: int
    prefix_hit_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    prefill_kv_tokens_read: int = 0
    prefill_pairs: int = 0
    sampled_sequences: int = 0
    communication_seconds: float | None = 0.0
    used_tokens: int = 0
    waiting_seconds: float | None = 0.0
    drafted_by_depth: tuple[int, ...] = ()
    accepted_by_depth: tuple[int, ...] = ()
    draft_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Time of the whole step."""
        return self.device_seconds + self.host_seconds
