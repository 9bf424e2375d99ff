"""Seconds of the steps of one configuration, tabulated, so that arithmetic can ask often."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autotune.planning.planned_traffic import Floats, LengthSample
from autotune.predict.step_cost import StepWork
from autotune.predict.virtual_engine import Cost
from engine.batch import Batch, ScheduledSequence
from engine.block_groups import BlockGroup, mean_visible_tokens
from engine.config import EngineConfig
from engine.request import Request, SamplingParams

# Batches at which decodes are asked for, and those beside which prompts are.
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024)
_BESIDE = (0, 16, 64, 256, 1024)
# Prompts that are asked for, as quantiles of the traffic's; between them it is nearly straight.
_QUANTILES = (0.0, 0.3, 0.6, 0.9, 1.0)


@dataclass(frozen=True, slots=True)
class StepTable:
    """Straight between what was asked for.

    - `decode`: seconds of a step that decodes `batches` sequences of the traffic's mean context.
    - `added`: by `beside`, what a prompt of the mean adds to steps that decode so many.
    - `added_square`: the mean square of that over the traffic's prompts.
    - `alone`: seconds of the steps that compute each prompt of the sample, by `beside`.
    - `full`: seconds that a prompt of the mean takes of steps which are full of prompts.
    """

    batches: Floats
    decode: Floats
    beside: Floats
    added: Floats
    added_square: Floats
    alone: Floats
    full: Floats

    def decode_seconds(self, batch: float) -> float:
        """Of a step that decodes so many sequences and does nothing else."""
        return float(np.interp(batch, self.batches, self.decode))

    def added_seconds(self, batch: float) -> float:
        """What a prompt of the mean adds to the steps of so many decodes."""
        return float(np.interp(batch, self.beside, self.added))

    def full_seconds(self, batch: float) -> float:
        """Of a prompt of the mean where prompts queue."""
        return float(np.interp(batch, self.beside, self.full))

    def spread(self, batch: float) -> float:
        """E[S^2] / E[S]^2 of the prompts' times."""
        mean = float(np.interp(batch, self.beside, self.added))
        square = float(np.interp(batch, self.beside, self.added_square))
        return max(1.0, square / mean**2) if mean > 0 else 1.0

    def alone_seconds(self, batch: float) -> Floats:
        """Of the steps with each prompt of the sample, beside so many decodes."""
        place = float(np.interp(batch, self.beside, np.arange(len(self.beside))))
        below = min(int(place), len(self.beside) - 1)
        above = min(below + 1, len(self.beside) - 1)
        weight = place - below
        row: Floats = (1 - weight) * self.alone[below] + weight * self.alone[above]
        return row


def tabulate(
    cost: Cost, config: EngineConfig, groups: tuple[BlockGroup, ...], sample: LengthSample
) -> StepTable:
    """Ask a cost for the steps that a traffic makes under a config."""
    seats = config.max_num_seqs
    batches = [b for b in _BATCHES if b < seats] + [seats]
    beside = [b for b in _BESIDE if b < seats] + ([seats] if seats > 1 else [])
    context = round(sample.mean_context)
    seen = mean_visible_tokens(groups, max(1, context), 1)

    def decodes(count: int) -> float:
        work = StepWork(count, 0, count, count, count * seen, 0, 0)
        return cost.device_seconds(work) + cost.host_seconds(work)

    decode = [decodes(count) for count in batches]
    lengths = np.unique(np.round(np.quantile(sample.new, _QUANTILES)))
    cached = float(np.mean(sample.inputs - sample.new) / np.mean(sample.new))
    mean = float(np.mean(sample.new))
    added, squares, alone, full = [], [], [], []
    for count in beside:
        room = max(1, config.max_num_batched_tokens - count)
        base = float(np.interp(count, batches, decode)) if count else 0.0
        prompts = _Prompts(cost, groups, count, count * seen, room)
        times = np.array([prompts.seconds(int(n), int(n * cached)) for n in lengths])
        chunks = np.ceil(lengths / room)
        of_all = np.interp(sample.new, lengths, times)
        # What a prompt takes off the others is what its steps take longer than decodes alone.
        extra = np.interp(sample.new, lengths, np.maximum(0.0, times - chunks * base))
        alone.append(of_all)
        added.append(float(np.mean(extra)))
        squares.append(float(np.mean(extra**2)))
        full.append(prompts.full_step(mean, mean * cached) * mean / room)
    return StepTable(
        np.array(batches, dtype=np.float64),
        np.array(decode),
        np.array(beside, dtype=np.float64),
        np.array(added),
        np.array(squares),
        np.array(alone),
        np.array(full),
    )


class _Prompts:
    """Times of prompts that are computed in chunks beside `decodes` decodes."""

    def __init__(
        self, cost: Cost, groups: tuple[BlockGroup, ...], decodes: int, seen: float, room: int
    ) -> None:
        self._cost = cost
        self._groups = groups
        self._decodes = decodes
        self._seen = seen
        self._room = room
        self._request = Request("", [0], SamplingParams(max_tokens=1), 0.0)

    def seconds(self, new: int, cached: int) -> float:
        """Of all steps of a prompt of `new` tokens after `cached` ones."""
        whole, rest = divmod(max(1, new), self._room)
        total = 0.0
        if whole:
            # A chunk's time grows evenly with what lies before it.
            first = self._step(cached, self._room)
            last = self._step(cached + (whole - 1) * self._room, self._room) if whole > 1 else first
            total += whole * (first + last) / 2
        if rest:
            total += self._step(cached + whole * self._room, rest)
        return total

    def full_step(self, new: float, cached: float) -> float:
        """Of a step that is full of prompts, or parts of prompts, of the mean."""
        one = self._work(int(cached), max(1, int(new)))
        count = self._room / max(1, int(new))
        work = StepWork(
            self._room,
            max(1, round(count)),
            0,
            max(1.0, count),
            0,
            count * one.prefill_kv_tokens,
            count * one.prefill_pairs,
        )
        return self._beside_decodes(work)

    def _step(self, start: int, tokens: int) -> float:
        return self._beside_decodes(self._work(start, tokens))

    def _work(self, start: int, tokens: int) -> StepWork:
        chunk = ScheduledSequence(self._request, start, tokens, True)
        return StepWork.of_batch(Batch([chunk], 0), self._groups)

    def _beside_decodes(self, work: StepWork) -> float:
        count = self._decodes
        both = work._replace(
            rows=work.rows + count,
            sampled=work.sampled + count,
            decode_sequences=count,
            decode_kv_tokens=self._seen,
        )
        return self._cost.device_seconds(both) + self._cost.host_seconds(both)
