"""Seconds of the steps of configurations, tabulated, so that arithmetic can ask for all at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autotune.planning.planned_traffic import Floats, LengthSample
from autotune.predict.step_cost import StepWork
from autotune.predict.virtual_engine import Cost
from engine.batch import Batch, ScheduledSequence
from engine.block_groups import BlockGroup, mean_visible_tokens
from engine.request import Request, SamplingParams

# Batches at which decodes are asked for, and those beside which prompts are; straight between.
BATCHES = np.array([1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024], dtype=np.float64)
BESIDE = np.array([0, 16, 64, 256, 1024], dtype=np.float64)
# Prompts that are asked for, as quantiles of the traffic's.
_QUANTILES = (0.0, 0.35, 0.75, 1.0)
# Tokens of prompts that are counted on in a step however many decode.
_LEAST_ROOM = 64


@dataclass(frozen=True, slots=True)
class StepTable:
    """One configuration at one cost; see `StepTables`."""

    decode: Floats
    prompts: Floats
    full: Floats


@dataclass(frozen=True, slots=True)
class StepTables:
    """Several configurations under one traffic; the first axis is theirs.

    - `decode` [R, len(BATCHES)]: seconds of a step of decodes of the traffic's mean context.
    - `alone` [R, len(BESIDE), L]: seconds of the steps with a prompt, by what decodes beside it and
      by the prompt's length; `weights` [L, n] make the sample's prompts of these lengths.
    - `added` [R, len(BESIDE)]: what a prompt of the mean adds to steps that decode so many, and
      `square` the mean of its square.
    - `full` [R, len(BESIDE)]: what a prompt of the mean takes of steps that are full of prompts.
    """

    decode: Floats
    alone: Floats
    weights: Floats
    added: Floats
    square: Floats
    full: Floats

    @classmethod
    def stack(cls, tables: Sequence[StepTable], works: Sequence[StepWorks]) -> StepTables:
        """Tables of one traffic and what they were made from, side by side."""
        weights = works[0].weights
        decode = np.array([table.decode for table in tables])
        alone = np.array([table.prompts for table in tables])
        chunks = np.array([work.chunks for work in works])
        # What a prompt takes off a decode is what its steps take longer than without the prompt,
        # and the decode that asks is there in any case.
        base = np.array([np.interp(BESIDE, BATCHES, row) for row in decode])
        extra = np.maximum(0.0, alone - chunks * base[:, :, None]) @ weights
        return cls(
            decode,
            alone,
            weights,
            extra.mean(axis=2),
            (extra**2).mean(axis=2),
            np.array([table.full for table in tables]),
        )

    def repeated(self, times: int) -> StepTables:
        """The only one so many times."""
        return StepTables(
            np.repeat(self.decode, times, axis=0),
            np.repeat(self.alone, times, axis=0),
            self.weights,
            np.repeat(self.added, times, axis=0),
            np.repeat(self.square, times, axis=0),
            np.repeat(self.full, times, axis=0),
        )

    def between(self, first: int, last: int) -> StepTables:
        """Some of them."""
        one = slice(first, last)
        return StepTables(
            self.decode[one],
            self.alone[one],
            self.weights,
            self.added[one],
            self.square[one],
            self.full[one],
        )


class StepWorks:
    """The steps that are asked for: what they compute, whatever it costs.

    Args:
        step_tokens: most tokens of a step.
        groups: the cache's.
        sample: the traffic's lengths.
    """

    def __init__(
        self, step_tokens: int, groups: tuple[BlockGroup, ...], sample: LengthSample
    ) -> None:
        seen = mean_visible_tokens(groups, max(1, round(sample.mean_context)), 1)
        self._decodes = [
            StepWork(count, 0, count, count, count * seen, 0, 0) for count in BATCHES.astype(int)
        ]
        lengths = np.unique(np.round(np.quantile(sample.new, _QUANTILES)))
        cached = float(np.mean(sample.inputs - sample.new) / np.mean(sample.new))
        self.weights = np.array(
            [np.interp(sample.new, lengths, row) for row in np.eye(len(lengths))]
        )
        self._prompts: list[list[list[tuple[float, StepWork]]]] = []
        self._full: list[tuple[float, StepWork]] = []
        chunks = []
        mean = float(np.mean(sample.new))
        for count in BESIDE.astype(int):
            room = max(_LEAST_ROOM, step_tokens - count)
            beside = _Beside(groups, int(count), count * seen, room)
            self._prompts.append([beside.prompt(int(n), int(n * cached)) for n in lengths])
            self._full.append((mean / room, beside.full_step(mean, mean * cached)))
            chunks.append(np.ceil(lengths / room))
        self.chunks: Floats = np.array(chunks)

    def table(self, cost: Cost) -> StepTable:
        """Ask a cost for all of them."""

        def seconds(work: StepWork) -> float:
            return cost.device_seconds(work) + cost.host_seconds(work)

        return StepTable(
            np.array([seconds(work) for work in self._decodes]),
            np.array(
                [
                    [sum(times * seconds(work) for times, work in prompt) for prompt in beside]
                    for beside in self._prompts
                ]
            ),
            np.array([share * seconds(work) for share, work in self._full]),
        )


class _Beside:
    """Steps of prompts that are computed beside `decodes` decodes."""

    def __init__(
        self, groups: tuple[BlockGroup, ...], decodes: int, seen: float, room: int
    ) -> None:
        self._groups = groups
        self._decodes = decodes
        self._seen = seen
        self._room = room
        self._request = Request("", [0], SamplingParams(max_tokens=1), 0.0)

    def prompt(self, new: int, cached: int) -> list[tuple[float, StepWork]]:
        """How often which step: those of a prompt of `new` tokens after `cached` ones."""
        room = self._room
        whole, rest = divmod(max(1, new), room)
        steps = []
        if whole == 1:
            steps.append((1.0, self._step(cached, room)))
        elif whole:
            # A chunk's time grows evenly with what lies before it.
            steps.append((whole / 2, self._step(cached, room)))
            steps.append((whole / 2, self._step(cached + (whole - 1) * room, room)))
        if rest:
            steps.append((1.0, self._step(cached + whole * room, rest)))
        return steps

    def full_step(self, new: float, cached: float) -> StepWork:
        """A step that is full of prompts, or parts of prompts, of the mean."""
        one = self._work(int(cached), max(1, int(new)))
        count = self._room / max(1, int(new))
        return self._beside_decodes(
            StepWork(
                self._room,
                max(1, round(count)),
                0,
                max(1.0, count),
                0,
                count * one.prefill_kv_tokens,
                count * one.prefill_pairs,
            )
        )

    def _step(self, start: int, tokens: int) -> StepWork:
        return self._beside_decodes(self._work(start, tokens))

    def _work(self, start: int, tokens: int) -> StepWork:
        chunk = ScheduledSequence(self._request, start, tokens, True)
        return StepWork.of_batch(Batch([chunk], 0), self._groups)

    def _beside_decodes(self, work: StepWork) -> StepWork:
        count = self._decodes
        return work._replace(
            rows=work.rows + count,
            sampled=work.sampled + count,
            decode_sequences=count,
            decode_kv_tokens=self._seen,
        )
