"""The steps of a draft: one token each for many requests, each step made of the one before."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engine.kv_cache import KVCache
from engine.models.decoder import Decoder
from engine.packed_step import StepTensors
from engine.speculate.draft_cache import DraftedSequence
from engine.speculate.draft_choice import Chain, Choice, DraftChooser
from engine.speculate.short_step import Int64s, ShortStep
from engine.step_inputs import TABLE_MULTIPLE
from kernels import sampling
from kernels.cpu.recording import Recordings

# Steps of so many shapes keep their inputs, and what they compute in between takes so much at most.
_MOST_SHAPES = 64
_RECORDED_BYTES = 64 << 20


class _Outcome(NamedTuple):
    """What a step says: logits [S, vocabulary], and the choice of those who take the likeliest."""

    logits: Tensor
    likeliest: Choice


@dataclass(frozen=True, slots=True)
class _Course:
    """What a draft goes through: `sequences` by falling `limits`, and where their tokens go.

    positions and slots int64 [S, query_len + steps - 1]: the first step computes the first
    `query_len` of each, every other step one more. Block tables have `width` blocks.
    """

    sequences: Sequence[DraftedSequence]
    chains: Sequence[Chain]
    limits: Sequence[int]
    positions: Int64s
    slots: Int64s
    query_len: int
    width: int


class DraftSteps:
    """Computes the drafts of a model over its cache, whose layers share their block tables."""

    def __init__(self, decoder: Decoder, cache: KVCache, chooser: DraftChooser) -> None:
        self._decoder = decoder
        self._cache = cache
        self._chooser = chooser
        # Sizes of blocks are powers of two.
        self._block_bits = cache.block_size.bit_length() - 1
        self._block_mask = cache.block_size - 1
        # Tokens that a GPU has chosen need not be waited for, unless others are to be told.
        self._waits = decoder.device.type == "cpu" or decoder.ranks.size > 1
        self._shapes: dict[tuple[int, ...], ShortStep] = {}
        self._recordings: Recordings[_Outcome] | None = None
        if decoder.device.type == "cpu" and decoder.ranks.size == 1:
            self._recordings = Recordings(_RECORDED_BYTES)

    def draft(
        self, sequences: Sequence[DraftedSequence], limits: Sequence[int], floor: float
    ) -> list[Chain]:
        """A chain for each sequence, of as many tokens as its limit; limits fall.

        Of each sequence only the last few tokens may be lacking; it has blocks for what is drafted.
        A chain ends earlier where its chance falls below `floor`, if tokens are waited for.
        """
        # After a draft that was accepted as a whole there are two tokens to compute: its last and
        # the model's own. If one request has, all compute their last two.
        query_len = max(s.num_lacking for s in sequences)
        lengths = [len(s.request.token_ids) for s in sequences]
        own = [s.own.tables for s in sequences]
        # A longer draft before may have left more blocks than this one needs.
        width = self._width(max(lengths) + limits[0], max(len(t.groups[0]) for t in own))
        first = self._shape(len(sequences), query_len, width, 0)
        tables = first.write_tables(own)
        positions = np.array([lengths]).T + np.arange(-query_len, limits[0] - 1)
        course = _Course(
            sequences,
            [self._chooser.chain(s.request) for s in sequences],
            limits,
            positions,
            self._slots(tables, positions),
            query_len,
            width,
        )
        last = [s.request.token_ids[-query_len:] for s in sequences]
        tokens = list(itertools.chain.from_iterable(last))
        first.write(tokens, positions[:, :query_len], course.slots[:, :query_len])
        choice = self._step(first, course.chains, 0)
        if self._waits or any(chain.penalised for chain in course.chains):
            self._go_on_waiting(course, choice, floor)
        else:
            self._go_on_queued(course, choice)
        for sequence, chain in zip(sequences, course.chains, strict=True):
            sequence.followed_by(chain.token_ids)
        return list(course.chains)

    def hidden(self, step: StepTensors) -> Tensor:
        """Compute a step: hidden states [T, hidden] after the last norm."""
        caches = self._cache.layers
        layouts = step.layouts * len(caches)
        return self._decoder.forward(step.token_ids, step.positions, caches, layouts)

    def _go_on_waiting(self, course: _Course, choice: Choice, floor: float) -> None:
        """The steps after the first, whose tokens are looked at before the next is made."""
        chains, limits = course.chains, course.limits
        rows = list(range(len(chains)))
        _append(chains, rows, choice)
        for index in range(1, limits[0]):
            rows = [r for r in rows if limits[r] > index and chains[r].chances[-1] >= floor]
            if not rows:
                return
            step = self._shape(len(rows), 1, course.width, index)
            step.write_tables([course.sequences[row].own.tables for row in rows])
            place = rows, course.query_len - 1 + index
            tokens = [chains[row].token_ids[-1] for row in rows]
            step.write(tokens, course.positions[place][:, None], course.slots[place][:, None])
            choice = self._step(step, [chains[row] for row in rows], index)
            _append(chains, rows, choice)

    def _go_on_queued(self, course: _Course, choice: Choice) -> None:
        """The same on a GPU, which is given all the steps before the first is done."""
        choices = [choice]
        count = len(course.chains)
        for index in range(1, course.limits[0]):
            while course.limits[count - 1] <= index:
                count -= 1
            step = self._shape(count, 1, course.width, index)
            step.write_tables([s.own.tables for s in course.sequences[:count]])
            column = slice(course.query_len - 1 + index, course.query_len + index)
            step.write(None, course.positions[:count, column], course.slots[:count, column])
            step.tensors.token_ids.copy_(choices[-1].tokens[:count])
            choices.append(self._step(step, course.chains[:count], index))
        for choice in choices:
            _append(course.chains, range(len(choice.tokens)), choice)

    def _step(self, step: ShortStep, chains: Sequence[Chain], index: int) -> Choice:
        """Compute a step that was written, on all ranks, and choose token `index` of each chain."""
        self._decoder.ranks.step(step.header, step.words, draft=True)
        if self._recordings is None:
            return self._chooser.choose(self._logits(step), chains, index)
        outcome = self._recordings.run(step, partial(self._outcome, step))
        if all(chain.takes_likeliest for chain in chains):
            return outcome.likeliest
        return self._chooser.choose(outcome.logits, chains, index)

    def _outcome(self, step: ShortStep) -> _Outcome:
        logits = self._logits(step)
        return _Outcome(logits, Choice(*sampling.likeliest_shares(logits)))

    def _logits(self, step: ShortStep) -> Tensor:
        """Scores [count, vocabulary] of what follows each sequence's last token."""
        hidden = self.hidden(step.tensors)
        return self._decoder.logits(hidden[step.query_len - 1 :: step.query_len])

    def _slots(self, tables: NDArray[np.int32], positions: Int64s) -> Int64s:
        """Where in the cache tokens lie; tables [S, width], positions [S, n] -> [S, n].

        Sequences that stop earlier have no blocks for what comes after: that is never computed.
        """
        blocks = positions >> self._block_bits
        if len(tables) == 1:
            owned = tables[0][blocks]
        else:
            owned = tables[np.arange(len(tables))[:, None], blocks]
        slots: Int64s = owned.astype(np.int64) << self._block_bits
        slots += positions & self._block_mask
        return slots

    def _width(self, num_tokens: int, num_blocks: int) -> int:
        """Blocks of tables for so many tokens and so many blocks: they grow seldom."""
        blocks = max(TABLE_MULTIPLE, num_blocks, -(-num_tokens // self._cache.block_size))
        return 1 << (blocks - 1).bit_length()

    def _shape(self, count: int, query_len: int, width: int, index: int) -> ShortStep:
        """The inputs of a step; `index` is its place among the steps of a draft.

        On a GPU the step before may still be waiting for its inputs, so each has its own.
        """
        key = (count, query_len, width, 0 if self._waits else index)
        step = self._shapes.get(key)
        if step is None:
            if len(self._shapes) >= _MOST_SHAPES:
                del self._shapes[next(iter(self._shapes))]
            step = self._shapes[key] = ShortStep(count, query_len, width, self._decoder.device)
        return step


def _append(chains: Sequence[Chain], rows: Sequence[int], choice: Choice) -> None:
    """Add to some chains what was chosen for them; waits for the device."""
    tokens: list[int] = choice.tokens.tolist()
    shares: list[float] = choice.shares.tolist()
    for index, row in enumerate(rows):
        chain = chains[row]
        drawn_from = None
        if chain.seed is not None and choice.drawn_from is not None:
            drawn_from = choice.drawn_from[index]
        chain.append(tokens[index], shares[index], drawn_from)
