"""Drafts by a smaller model of the same vocabulary, with a paged cache of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.batch import Batch, ScheduledSequence
from engine.blocks import BlockPool
from engine.config import EngineConfig
from engine.kv_cache import KVCache, cache_dtype, kv_bytes_per_token
from engine.models.decoder import Decoder
from engine.packed_step import StepBuffer, StepHeader
from engine.parallel import all_or_none
from engine.request import Request
from engine.speculate.draft import Draft
from engine.speculate.draft_cache import DraftCache, DraftedSequence
from engine.speculate.draft_choice import DraftChooser
from engine.speculate.draft_steps import DraftSteps
from engine.step_inputs import StepInputs

# A step takes as long for one token as for so many.
_FEW_TOKENS = 16


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
        # Beyond its own limit the draft model knows no positions: nothing is drafted there.
        self._longest = min(max_model_len, decoder.spec.max_position)
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
        self._chooser = DraftChooser(config.seed, eos_token_ids)
        self._steps = DraftSteps(decoder, self._cache, self._chooser)
        self._step_tokens = config.max_num_batched_tokens
        self.floor = 0.0
        """See `ChainProposer`."""

    @property
    def pool(self) -> BlockPool:
        """The blocks of the draft's cache."""
        return self._sequences.pool

    def apply_live(self, config: EngineConfig) -> None:
        """Take over `live` knobs from the next drafts on."""
        self.pool.enable_prefix_caching = config.enable_prefix_caching
        self._chooser.seed = config.seed
        self._step_tokens = config.max_num_batched_tokens

    def clear(self) -> None:
        """See `Proposer`."""
        self.pool.clear_prefix_cache()

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
            limits = [limit for limit, _ in rows]
            chains = self._steps.draft(sequences, limits, self.floor)
        done = {s.request: chain.draft() for s, chain in zip(sequences, chains, strict=True)}
        return [done.get(request) for request in requests]

    def lacking(self, requests: Sequence[Request]) -> list[int]:
        """Tokens of each request that are to be computed before its newest one can be."""
        return [self._sequences.lacking(request) for request in requests]

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
            hidden = self._steps.hidden(step)
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
            self._steps.hidden(buffer.tensors(header))
            for chunk, sequence in zip(chunks, behind, strict=False):
                sequence.computed(chunk.start + chunk.num_tokens)
                self._sequences.register(sequence)
            behind = [s for s in behind if s.num_lacking > 1]


def bytes_per_token(decoder: Decoder, config: EngineConfig) -> int:
    """Bytes that a token takes in the draft's KV cache, of one rank."""
    return kv_bytes_per_token(decoder.spec, cache_dtype(config, decoder.dtype))
