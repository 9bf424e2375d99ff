"""A load's steps as columns, so that hundreds of thousands of them are summed in a moment."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.step_record import StepRecord

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

# Counts by depth are no columns.
_FIELDS = tuple(f.name for f in dataclasses.fields(StepRecord) if not f.name.endswith("_by_depth"))


@dataclass(frozen=True, slots=True)
class StepColumns:
    """One entry a step, in time; seconds and tokens as float64.

    `end` is never after the next step's start: of a step that another overlaps, as on a device
    that is kept busy, the part before that counts. `communication` and `waiting` are NaN where not
    measured. `drafted` and `accepted` count tokens, `drafting` is the part of `host` that went to
    them. `tells_attention` is False for the records of an earlier release, which lack what
    attention computes and who was sampled.
    """

    start: Floats
    end: Floats
    seconds: Floats
    device: Floats
    host: Floats
    scheduler: Floats
    communication: Floats
    waiting: Floats
    prefill_tokens: Floats
    prefill_sequences: Floats
    decodes: Floats
    sampled: Floats
    drafted: Floats
    accepted: Floats
    drafting: Floats
    kv_tokens: Floats
    prefill_kv_tokens: Floats
    prefill_pairs: Floats
    hit_tokens: Floats
    queue: Floats
    running: Floats
    blocks_used: Floats
    blocks_total: Floats
    used_tokens: Floats
    preemptions: Floats
    tells_attention: bool

    @classmethod
    def of(cls, steps: Sequence[StepRecord]) -> StepColumns:
        """The columns of step records, which lie in time."""
        rows = {name: _column(steps, name) for name in _FIELDS}
        start, seconds = rows["start"], rows["device_seconds"] + rows["host_seconds"]
        end = start + seconds
        if len(start):
            end[:-1] = np.maximum(start[:-1], np.minimum(end[:-1], start[1:]))
        return cls(
            start=start,
            end=end,
            seconds=seconds,
            device=rows["device_seconds"],
            host=rows["host_seconds"],
            scheduler=rows["scheduler_seconds"],
            communication=rows["communication_seconds"],
            waiting=rows["waiting_seconds"],
            prefill_tokens=rows["prefill_tokens"],
            prefill_sequences=rows["prefill_sequences"],
            decodes=rows["decode_sequences"],
            sampled=rows["sampled_sequences"],
            drafted=rows["drafted_tokens"],
            accepted=rows["accepted_tokens"],
            drafting=rows["draft_seconds"],
            kv_tokens=rows["kv_tokens_read"],
            prefill_kv_tokens=rows["prefill_kv_tokens_read"],
            prefill_pairs=rows["prefill_pairs"],
            hit_tokens=rows["prefix_hit_tokens"],
            queue=rows["queue_length"],
            running=rows["running"],
            blocks_used=rows["blocks_used"],
            blocks_total=rows["blocks_total"],
            used_tokens=rows["used_tokens"],
            preemptions=rows["preemptions"],
            # A decode always samples, so steps with decodes and no sampled sequence do not tell.
            tells_attention=bool(np.all(rows["sampled_sequences"] >= rows["decode_sequences"])),
        )

    def __len__(self) -> int:
        return len(self.start)

    @property
    def rows(self) -> Floats:
        """Tokens that each step computed, drafted ones included."""
        return self.prefill_tokens + self.decodes + self.drafted

    @property
    def decode_pairs(self) -> Floats:
        """Pairs of query and key of decodes, whose drafted tokens see what the last token sees."""
        seen = self.kv_tokens - self.prefill_kv_tokens
        return seen * (1.0 + self.drafted / np.maximum(self.decodes, 1.0))

    @property
    def sequences(self) -> Floats:
        """Sequences of each step."""
        return self.prefill_sequences + self.decodes

    def share_of_time(self, mask: Mask) -> float | None:
        """The part of the steps' time that the steps of `mask` took; None without any time."""
        total = float(self.seconds.sum())
        return float(self.seconds[mask].sum()) / total if total > 0 else None

    def over_time(self, values: Floats) -> float | None:
        """The mean of a quantity over the steps' time; None without any time."""
        total = float(self.seconds.sum())
        return float(self.seconds @ values) / total if total > 0 else None


def _column(steps: Sequence[StepRecord], name: str) -> Floats:
    values: list[Any] = [getattr(step, name) for step in steps]
    if name in ("communication_seconds", "waiting_seconds"):
        values = [np.nan if value is None else value for value in values]
    return np.array(values, dtype=np.float64)
