"""Executes batches on a device: inputs, forward pass, sampling, and how long each took."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.batch import Batch, BatchResult
from engine.block_groups import BlockGroup, block_groups
from engine.config import EngineConfig
from engine.errors import EngineError, EnvironmentLacks
from engine.forward_pass import ForwardPass
from engine.graph_sizes import most_sequences
from engine.kv_cache import KVCache, cache_dtype, num_blocks_for
from engine.models.decoder import Decoder
from engine.packed_step import StepBuffer, StepHeader
from engine.request import Request, SamplingParams
from engine.sampled_row import sampled_rows
from engine.sampler import Sampler
from engine.speculate.drafting import Drafting
from engine.speculate.drawn import settle_drawn
from engine.speculate.speculator import Speculator
from engine.step_in_flight import StepInFlight
from engine.step_inputs import StepInputs
from engine.stopwatch import stopwatch_for
from engine.warmup import warmup_batches
from kernels import ops


class ModelRunner:
    """The `Executor` of a loaded model.

    Owns the KV cache's tensors; which blocks are whose is the scheduler's business. On a GPU it is
    `pipelined`: `launch` does not wait for the device; and `compiles` kernels when they are first
    met, which `warmup` does ahead.

    Raises:
        EnvironmentLacks: the KV cache does not fit (see `engine.kv_cache`).
    """

    def __init__(
        self,
        decoder: Decoder,
        config: EngineConfig,
        max_model_len: int,
        eos_token_ids: Sequence[int] = (),
        forward: ForwardPass | None = None,
    ) -> None:
        self.decoder = decoder
        self.pipelined = self.compiles = decoder.device.type == "cuda"
        self.forward = forward or ForwardPass(decoder)
        self._ranks = decoder.ranks
        self._followed = StepBuffer(decoder.device), StepBuffer(decoder.device)
        self._sampler = Sampler(config.seed, eos_token_ids)
        self._drafting = Drafting(decoder, eos_token_ids)
        set_threads(config, decoder.device, self._ranks.size)
        self._build_cache(config, max_model_len)

    @property
    def cache(self) -> KVCache:
        """The KV cache."""
        return self.forward.cache

    @property
    def groups(self) -> tuple[BlockGroup, ...]:
        """The layers in groups that share a block table."""
        return self.forward.groups

    @property
    def speculator(self) -> Speculator | None:
        """Who drafts for an engine of this runner, if the config says so."""
        return self._drafting.speculator

    @property
    def notes(self) -> list[str]:
        """Sentences on what does not run as it was asked."""
        return self.forward.notes

    @property
    def num_blocks(self) -> int:
        """Blocks of the KV cache."""
        return self.cache.num_blocks

    def apply_live(self, config: EngineConfig) -> None:
        """Take over `live` knobs from the next step on."""
        self._ranks.tell("apply_live", config=config.to_dict())
        self._sampler.seed = config.seed
        self._drafting.apply_live(config)
        set_threads(config, self.decoder.device, self._ranks.size)

    def outgrown_by(self, config: EngineConfig) -> bool:
        """Whether steps of `config` may need more memory than was measured beside the cache."""
        built = self._config
        return self.forward.measures(config) and (
            config.max_num_batched_tokens > built.max_num_batched_tokens
            or most_sequences(config) > most_sequences(built)
        )

    def reconfigure(self, config: EngineConfig, max_model_len: int) -> None:
        """Replace the KV cache by one for `config`; what it held is lost.

        Nothing may be running. Where kernels are compiled for a cache, that is done here.

        Raises:
            EnvironmentLacks: the new cache does not fit; one of the old shape is in place.
        """
        old_config, old_len = self._config, self.max_model_len
        with self._ranks.uninterrupted():
            self._ranks.tell("reconfigure", config=config.to_dict(), max_model_len=max_model_len)
            self.forward.release()  # first, so that both need not fit beside each other
            self._drafting.release()
            try:
                self._build_cache(config, max_model_len)
            except EngineError as error:
                drop_locals(error)
                self._build_cache(old_config, old_len)
                self._begin()
                raise
            self._begin()

    def _begin(self) -> None:
        """Be ready for requests on a cache that was rebuilt."""
        if self._ranks.rank == 0:  # the others follow
            if self.compiles:
                self.warmup()
            self.begin_speculation()

    def begin_speculation(self) -> None:
        """Be ready to draft, after the first `warmup`; writes to the first blocks, as that does."""
        self._drafting.begin(self, self._config, self.max_model_len)

    def execute(self, batch: Batch) -> BatchResult:
        """Run one step, see `launch`."""
        return self.launch(batch).wait()

    def launch(self, batch: Batch) -> StepInFlight:
        """Hand a step to the device; what came before must have been waited for.

        Its `device_seconds` go from the inputs' being ready to the chosen tokens' being on the
        host.
        """
        start = time.perf_counter()
        sequences = batch.sequences
        forward = self.forward
        stopwatch = stopwatch_for(self.decoder.device)
        pending = None
        with self._ranks.lockstep(), torch.inference_mode():
            header, buffer = self._inputs.pack(batch, forward.shape_for(batch))
            self._ranks.step(header, buffer.words(header))
            prepared = time.perf_counter()
            before = self._ranks.collective_seconds
            stopwatch.start()
            scores = forward.run(header, buffer)
            on_accepted = None
            if scores is not None:
                rows = sampled_rows(sequences)
                count = len(rows)
                logits, hidden, likeliest = scores
                if len(logits) > count:  # a padded step
                    logits, hidden = logits[:count], hidden[:count]
                if likeliest is not None:
                    likeliest = likeliest[:count]
                settled = settle_drawn(self._sampler, sequences, rows, logits)
                pending = self._sampler.launch(logits, rows, likeliest, settled)
                on_accepted = self._drafting.follower(sequences, hidden, self._move_everywhere)
            stopwatch.stop()
        after = self._ranks.collective_seconds
        collectives = after.since(before) if after is not None and before is not None else None
        seconds = prepared - start
        return StepInFlight(
            batch, pending, seconds, stopwatch, self._ranks, collectives, on_accepted
        )

    def follow(self, header: StepHeader, words: Tensor) -> None:
        """Compute a step that the driver has packed, as another of its ranks.

        The step before last is done when the driver sends this one, so that two buffers suffice.
        """
        with torch.inference_mode():
            buffer, other = self._followed
            self._followed = other, buffer
            buffer.words(header).copy_(words)
            self.forward.run(header, buffer)

    def follow_draft(self, header: StepHeader, words: Tensor) -> None:
        """The same for a step of the draft model."""
        self._drafting.follow(header, words)

    def warmup(self) -> None:
        """Run steps of all kinds through the model, so that no measured step compiles.

        Writes to the first blocks, so call it before any request runs.
        """
        blocks = [group % self.num_blocks for group in range(len(self.groups))]
        for batch in warmup_batches(
            self._config,
            self.max_model_len,
            blocks,
            compiles=self.compiles,
            most_captured=self.forward.most_captured,
        ):
            self.execute(batch)

    def move_kv(self, sources: list[int], targets: list[int]) -> None:
        """Move keys and values between slots of every layer: see `kernels.ops.move_kv`."""
        device = self.decoder.device
        slots = torch.tensor([sources, targets], dtype=torch.int64, device=device)
        with torch.inference_mode():
            for layer in self.cache.layers:
                ops.move_kv(layer, slots[0], slots[1])

    def _move_everywhere(self, sources: list[int], targets: list[int]) -> None:
        self._ranks.tell("move_kv", sources=sources, targets=targets)
        self.move_kv(sources, targets)

    def _build_cache(self, config: EngineConfig, max_model_len: int) -> None:
        decoder, forward = self.decoder, self.forward
        groups = block_groups(decoder.spec.layer_windows, max_model_len)
        dtype = cache_dtype(config, decoder.dtype)
        drafting = self._drafting
        drafting.take(config)
        # As many blocks everywhere: one scheduler gives them out.
        budget = self._ranks.minimum(
            forward.cache_budget(config, max_model_len, self._sample_anything)
        )
        beside = drafting.bytes_per_token
        num_blocks = num_blocks_for(
            config, decoder.spec, dtype, max_model_len, budget, groups, beside
        )
        forward.allocate(config, max_model_len, num_blocks)
        try:
            drafting.allocate(config, max_model_len, num_blocks)
        except EnvironmentLacks:
            forward.release()
            raise
        self._inputs = StepInputs(config.block_size, max_model_len, decoder.device, len(groups))
        self._config, self.max_model_len = config, max_model_len

    def _sample_anything(self, logits: Tensor) -> None:
        """Choose tokens in the way that takes the most memory; logits [S, vocabulary]."""
        sampling = SamplingParams(top_k=50, top_p=0.9, min_p=0.01, presence_penalty=0.1, logprobs=5)
        requests = [Request(str(i), [0], sampling, 0.0) for i in range(len(logits))]
        self._sampler.sample(logits, requests)


def set_threads(config: EngineConfig, device: torch.device, num_ranks: int) -> None:
    """On a CPU: as many threads as asked for, or as there are cores, divided among the ranks."""
    if device.type == "cpu":
        threads = max(1, (config.num_threads or len(os.sched_getaffinity(0))) // num_ranks)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def drop_locals(error: BaseException) -> None:
    """Let go of what the functions that failed had in hand: a traceback keeps it.

    On a GPU that may be the very memory that is to be used next.
    """
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
