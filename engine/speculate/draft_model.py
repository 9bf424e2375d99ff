"""Drafts by a smaller model of the same vocabulary, with a paged cache of its own."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import Batch, ScheduledSequence
from engine.blocks import BlockPool
from engine.config import EngineConfig
from engine.kv_cache import KVCache, cache_dtype, kv_bytes_per_token
from engine.models.decoder import Decoder
from engine.packed_step import StepBuffer, StepHeader, StepTensors
from engine.parallel import all_or_none
from engine.request import Request
from engine.speculate.draft import Draft
from engine.speculate.draft_cache import DraftCache, DraftedSequence
from engine.speculate.draft_choice import Chain, Choice, DraftChooser
from engine.speculate.short_step import Int64s, ShortStep
from engine.step_inputs import TABLE_MULTIPLE, StepInputs
from kernels import sampling
from kernels.cpu.recording import Recordings

# A step takes as long for one token as for so many.
_FEW_TOKENS = 16
# Steps of so many shapes keep their inputs, and what they compute in between takes so much at most.
_MOST_SHAPES = 64
_RECORDED_BYTES = 64 << 20


class _Outcome(NamedTuple):
    """What a step says: logits [S, vocabulary], and the choice of those who take the likeliest."""

    logits: Tensor
    likeliest: Choice


class DraftModel:
    """The `Proposer` of a loaded draft model; on other ranks it follows.

    Args:
        decoder: the draft model, or this rank's part of it.
        config: the engine's.
        max_model_len: tokens of the longest sequence of the engine.
        num_blocks: blocks of the draft's own KV cache, `config.block_size` tokens each
            (`bytes_per_token`).
        eos_token_ids: the engine's end tokens, which `min_tokens` forbids.

    Raises:
        EnvironmentLacks: the cache does not fit.
    """

    costs_device = True

    def __init__(
        self,
        decoder: Decoder,
        config: EngineConfig,
        max_model_len: int,
        num_blocks: int,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self.decoder = decoder
        self._device = decoder.device
        # Beyond its own limit the draft model knows no positions: nothing is drafted there.
        self._longest = min(max_model_len, decoder.spec.max_position)
        self._block_size = config.block_size
        decoder.set_max_position(self._longest)
        dtype = cache_dtype(config, decoder.dtype)
        # Layers with windows keep all tokens, too: so a sequence can fall back by any number.
        self._cache = all_or_none(
            decoder.ranks,
            lambda: KVCache.allocate(
                decoder.spec, num_blocks, config.block_size, dtype, decoder.device
            ),
        )
        pool = BlockPool(num_blocks, config.block_size, config.enable_prefix_caching)
        self._sequences = DraftCache(pool)
        self._inputs = StepInputs(config.block_size, self._longest, decoder.device)
        self._followed = StepBuffer(decoder.device), StepBuffer(decoder.device)
        self._shapes: dict[tuple[int, ...], ShortStep] = {}
        self._recordings: Recordings[_Outcome] | None = None
        if decoder.device.type == "cpu" and decoder.ranks.size == 1:
            self._recordings = Recordings(_RECORDED_BYTES)
        self._chooser = DraftChooser(config.seed, eos_token_ids)
        self._step_tokens = config.max_num_batched_tokens
        # Tokens that a GPU has chosen need not be waited for, unless others are to be told.
        self._waits = decoder.device.type == "cpu" or decoder.ranks.size > 1

    @property
    def pool(self) -> BlockPool:
        """The blocks of the draft's cache."""
        return self._sequences.pool

    def apply_live(self, config: EngineConfig) -> None:
        """Take over `live` knobs from the next drafts on."""
        self.pool.enable_prefix_caching = config.enable_prefix_caching
        self._chooser.seed = config.seed
        self._step_tokens = config.max_num_batched_tokens

    def propose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[Draft | None]:
        """A draft for each request, see `Proposer`; None also where its cache has no room."""
        drafts: list[Draft | None] = [None] * len(requests)
        asked: dict[Request, int] = {}
        for request, limit in zip(requests, limits, strict=True):
            # The last drafted token is not computed.
            limit = min(limit, self._longest - len(request.token_ids) + 1)
            if limit > 0:
                asked[request] = limit
        rows: list[tuple[int, DraftedSequence]] = []
        # The longest drafts first, so that those which go on stand first.
        for request in sorted(asked, key=asked.__getitem__, reverse=True):
            sequence = self._sequences.take(request, asked[request], asked)
            if sequence is not None:
                rows.append((asked[request], sequence))
        if not rows:
            return drafts
        sequences = [sequence for _, sequence in rows]
        with self.decoder.ranks.lockstep(), torch.inference_mode():
            self._catch_up(sequences)
            chains = self._draft(sequences, [limit for limit, _ in rows])
        done = {s.request: chain.draft() for s, chain in zip(sequences, chains, strict=True)}
        return [done.get(request) for request in requests]

    def forget(self, request: Request) -> None:
        """Give up what is kept of a request; its blocks may still be found by others."""
        self._sequences.forget(request)

    def check_integrity(self) -> None:
        """Check the books of the draft's cache.

        Raises:
            BlockPoolCorrupt: they do not add up.
        """
        self._sequences.check_integrity()

    def follow(self, header: StepHeader, words: Tensor) -> None:
        """Compute a step that the driver has packed, as another of its ranks."""
        with torch.inference_mode():
            buffer, other = self._followed
            self._followed = other, buffer
            buffer.words(header).copy_(words)
            step = buffer.tensors(header)
            hidden = self._hidden(step)
            if len(step.last):
                self.decoder.logits(hidden[step.last])

    def _catch_up(self, sequences: Sequence[DraftedSequence]) -> None:
        """Compute the tokens that the requests got meanwhile, but for the last few.

        The first step of a draft computes those: as many for each as for the one that lacks most.
        """
        most = min(
            max(2, _FEW_TOKENS // len(sequences)), *(len(s.own.token_ids) for s in sequences)
        )
        behind = [s for s in sequences if s.num_lacking > most]
        while behind:
            room = self._step_tokens
            chunks: list[ScheduledSequence] = []
            for sequence in behind:
                start = sequence.num_computed
                count = min(room, sequence.num_lacking - 1)
                if count:
                    chunks.append(ScheduledSequence(sequence.own, start, count, False))
                    room -= count
            header, buffer = self._inputs.pack(Batch(chunks, 0))
            self.decoder.ranks.step(header, buffer.words(header), draft=True)
            self._hidden(buffer.tensors(header))
            for chunk, sequence in zip(chunks, behind, strict=False):
                sequence.computed(chunk.start + chunk.num_tokens)
                self._sequences.register(sequence)
            behind = [s for s in behind if s.num_lacking > 1]

    def _draft(self, sequences: Sequence[DraftedSequence], limits: Sequence[int]) -> list[Chain]:
        """Draft one token a step for all whose limit, in falling order, is not reached."""
        chains = [self._chooser.chain(s.request) for s in sequences]
        count, depth = len(sequences), limits[0]
        # After a draft that was accepted as a whole there are two tokens to compute: its last and
        # the model's own. If one request has, all compute their last two.
        query_len = max(s.num_lacking for s in sequences)
        lengths = np.array([len(s.request.token_ids) for s in sequences])
        width = self._width(int(lengths.max()) + depth)
        step = self._shape(count, query_len, width, 0)
        tables = step.write_tables([s.own.tables for s in sequences])
        positions = lengths[:, None] + np.arange(-query_len, depth - 1)
        slots = self._slots(tables, positions)
        last = [s.request.token_ids[-query_len:] for s in sequences]
        tokens: list[int] | None = list(itertools.chain.from_iterable(last))
        chosen: list[Choice] = []
        for index in range(depth):
            if index:
                while limits[count - 1] <= index:
                    count -= 1
                tokens = None if tokens is None else tokens[:count]
                step = self._shape(count, 1, width, index)
                step.write_tables([s.own.tables for s in sequences[:count]])
            first = query_len - 1 + index if index else 0
            columns = slice(first, query_len + index)
            step.write(tokens, positions[:count, columns], slots[:count, columns])
            if tokens is None:
                step.tensors.token_ids.copy_(chosen[-1].tokens[:count])
            self.decoder.ranks.step(step.header, step.words, draft=True)
            choice = self._choose(step, chains[:count])
            tokens = None
            if self._waits or any(chain.penalised for chain in chains):
                tokens = self._append(chains, choice)
            else:
                chosen.append(choice)
        for choice in chosen:
            self._append(chains, choice)
        for sequence, chain in zip(sequences, chains, strict=True):
            sequence.num_known = len(sequence.request.token_ids)
            sequence.own.num_computed_tokens = sequence.num_known
            sequence.drafted = chain.token_ids[:-1]
        return chains

    def _slots(self, tables: NDArray[np.int32], positions: Int64s) -> Int64s:
        """Where in the cache tokens lie; tables [S, width], positions [S, n] -> [S, n].

        Those that stop earlier have no blocks for what comes after; nobody computes that.
        """
        blocks, offsets = np.divmod(positions, self._block_size)
        owned = np.take_along_axis(tables, np.minimum(blocks, tables.shape[1] - 1), 1)
        return owned.astype(np.int64) * self._block_size + offsets

    def _hidden(self, step: StepTensors) -> Tensor:
        """Compute a step: hidden states [T, hidden] after the last norm."""
        caches = self._cache.layers
        layouts = step.layouts * len(caches)
        return self.decoder.forward(step.token_ids, step.positions, caches, layouts)

    def _choose(self, step: ShortStep, chains: Sequence[Chain]) -> Choice:
        """Compute a step that was written and choose a token for each of its sequences."""
        if self._recordings is None:
            return self._chooser.choose(self._logits(step), chains)
        outcome = self._recordings.run(step, partial(self._likeliest, step))
        if all(chain.takes_likeliest for chain in chains):
            return outcome.likeliest
        return self._chooser.choose(outcome.logits, chains)

    def _likeliest(self, step: ShortStep) -> _Outcome:
        logits = self._logits(step)
        return _Outcome(logits, Choice(*sampling.likeliest_shares(logits)))

    def _logits(self, step: ShortStep) -> Tensor:
        """Scores [count, vocabulary] of what follows each sequence's last token."""
        hidden = self._hidden(step.tensors)
        return self.decoder.logits(hidden[step.query_len - 1 :: step.query_len])

    def _append(self, chains: Sequence[Chain], choice: Choice) -> list[int]:
        tokens: list[int] = choice.tokens.tolist()
        shares: list[float] = choice.shares.tolist()
        for row, (token, share) in enumerate(zip(tokens, shares, strict=True)):
            chain = chains[row]
            drawn_from = None
            if chain.seed is not None and choice.drawn_from is not None:
                drawn_from = choice.drawn_from[row]
            chain.append(token, share, drawn_from)
        return tokens

    def _width(self, num_tokens: int) -> int:
        """Blocks of tables for so many tokens: they grow seldom."""
        blocks = max(TABLE_MULTIPLE, -(-num_tokens // self._block_size))
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
            step = self._shapes[key] = ShortStep(count, query_len, width, self._device)
        return step


def bytes_per_token(decoder: Decoder, config: EngineConfig) -> int:
    """Bytes that a token takes in the draft's KV cache, of one rank."""
    return kv_bytes_per_token(decoder.spec, cache_dtype(config, decoder.dtype))
