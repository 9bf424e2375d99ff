"""Executes batches on a device: inputs, forward pass, sampling, and how long each took."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.batch import Batch, BatchResult, ScheduledSequence
from engine.block_groups import block_groups, group_of_layer
from engine.block_tables import BlockTables
from engine.config import EngineConfig
from engine.errors import EnvironmentLacks
from engine.kv_cache import KVCache, cache_dtype, cpu_cache_budget, num_blocks_for
from engine.models.decoder import Decoder
from engine.packed_step import StepBuffer, StepHeader, StepTensors
from engine.parallel import all_or_none
from engine.request import Request, SamplingParams, TokenLogprobs
from engine.sampler import Sampler
from engine.step_inputs import StepInputs
from kernels.metadata import build_attention_metadata


class ModelRunner:
    """The `Executor` of a loaded model.

    Owns the KV cache's tensors; which blocks are whose is the scheduler's business.

    Raises:
        EnvironmentLacks: the KV cache does not fit (see `engine.kv_cache`).
    """

    def __init__(
        self,
        decoder: Decoder,
        config: EngineConfig,
        max_model_len: int,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self.decoder = decoder
        self._ranks = decoder.ranks
        self._followed = StepBuffer(decoder.device), StepBuffer(decoder.device)
        self._sampler = Sampler(config.seed, eos_token_ids)
        set_threads(config, decoder.device, self._ranks.size)
        self._build_cache(config, max_model_len)

    @property
    def num_blocks(self) -> int:
        """Blocks of the KV cache."""
        return self.cache.num_blocks

    def apply_live(self, config: EngineConfig) -> None:
        """Take over `live` knobs from the next step on."""
        self._ranks.tell("apply_live", config=config.to_dict())
        self._sampler.seed = config.seed
        set_threads(config, self.decoder.device, self._ranks.size)

    def reconfigure(self, config: EngineConfig, max_model_len: int) -> None:
        """Replace the KV cache by one for `config`; what it held is lost.

        Raises:
            EnvironmentLacks: the new cache does not fit; one of the old shape is in place.
        """
        old_config, old_len = self._config, self.max_model_len
        with self._ranks.uninterrupted():
            self._ranks.tell("reconfigure", config=config.to_dict(), max_model_len=max_model_len)
            del self.cache  # first, so that both need not fit beside each other
            try:
                self._build_cache(config, max_model_len)
            except EnvironmentLacks:
                self._build_cache(old_config, old_len)
                raise

    def execute(self, batch: Batch) -> BatchResult:
        """Run one step.

        `device_seconds` ends when the chosen tokens are on the host.
        """
        start = time.perf_counter()
        with self._ranks.lockstep(), torch.inference_mode():
            header, buffer = self._inputs.pack(batch)
            self._ranks.step(header, buffer.words(header))
            step = buffer.tensors(header)
            prepared = time.perf_counter()
            hidden, last_tokens = self._forward(step), step.last
            tokens: list[list[int]] = [[] for _ in batch.sequences]
            logprobs: list[list[TokenLogprobs] | None] = []
            sampling = [i for i, s in enumerate(batch.sequences) if s.samples]
            if sampling:
                if len(last_tokens) != len(hidden):
                    hidden = hidden[last_tokens]
                sampled = self._sampler.sample(
                    self.decoder.logits(hidden), [batch.sequences[i].request for i in sampling]
                )
                for i, token in zip(sampling, sampled.token_ids, strict=True):
                    tokens[i] = [token]
                if sampled.logprobs:
                    logprobs = [None] * len(tokens)
                    for i, entry in zip(sampling, sampled.logprobs, strict=True):
                        logprobs[i] = None if entry is None else [entry]
            self._synchronize()
        end = time.perf_counter()
        return BatchResult(
            tokens=tokens,
            device_seconds=end - prepared,
            host_seconds=prepared - start,
            logprobs=logprobs,
        )

    def follow(self, header: StepHeader, words: Tensor) -> None:
        """Compute a step that the driver has packed, as another of its ranks.

        The step before last is done when the driver sends this one, so that two buffers suffice.
        """
        with torch.inference_mode():
            buffer, other = self._followed
            self._followed = other, buffer
            buffer.words(header).copy_(words)
            step = buffer.tensors(header)
            hidden = self._forward(step)
            if header.num_samples:
                self.decoder.logits(hidden if len(step.last) == len(hidden) else hidden[step.last])

    def _forward(self, step: StepTensors) -> Tensor:
        metadata = [step.layouts[group] for group in self._layer_group]
        return self.decoder.forward(step.token_ids, step.positions, self.cache.layers, metadata)

    def warmup(self) -> None:
        """Run a prompt and a decode through the model, so that no measured step compiles.

        Writes to the first blocks, so call it before any request runs.
        """
        tables = BlockTables([[i % self.num_blocks] for i in range(len(self.groups))])
        length = min(2, self.max_model_len - 1)
        greedy = SamplingParams(temperature=0.0)
        for tokens, chunk in ((length, length), (length + 1, 1)):
            if chunk < 1:
                continue
            request = Request("warmup", [0] * tokens, greedy, 0.0, tables=tables)
            sequence = ScheduledSequence(request, tokens - chunk, chunk, True)
            self.execute(Batch([sequence], num_decodes=int(chunk == 1)))

    def _build_cache(self, config: EngineConfig, max_model_len: int) -> None:
        decoder = self.decoder
        groups = block_groups(decoder.spec.layer_windows, max_model_len)
        dtype = cache_dtype(config, decoder.dtype)
        # As many blocks everywhere: one scheduler gives them out.
        budget = self._ranks.minimum(self._cache_budget(config, max_model_len))
        num_blocks = num_blocks_for(config, decoder.spec, dtype, max_model_len, budget, groups)
        decoder.set_max_position(max_model_len)
        self.cache = all_or_none(
            self._ranks,
            lambda: KVCache.allocate(
                decoder.spec, num_blocks, config.block_size, dtype, decoder.device, groups
            ),
        )
        self._inputs = StepInputs(config.block_size, max_model_len, decoder.device, len(groups))
        self._layer_group = group_of_layer(groups)
        self.groups = groups
        self._config, self.max_model_len = config, max_model_len

    def _cache_budget(self, config: EngineConfig, max_model_len: int) -> int:
        """Bytes for the KV cache."""
        if config.kv_cache_memory_bytes is not None:
            return config.kv_cache_memory_bytes
        if self.decoder.device.type == "cpu":
            return cpu_cache_budget() // self._ranks.size
        return self._measure_cuda_budget(config, max_model_len)

    def _measure_cuda_budget(self, config: EngineConfig, max_model_len: int) -> int:
        """Bytes that `gpu_memory_utilization` leaves beside weights, activations and others.

        Activations are measured: the largest step is run once on a cache of one block, which every
        sequence shares.
        """
        decoder, device = self.decoder, self.decoder.device
        decoder.set_max_position(max_model_len)
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        dtype = cache_dtype(config, decoder.dtype)
        cache = KVCache.allocate(decoder.spec, 1, config.block_size, dtype, device)
        tokens = config.max_num_batched_tokens
        lengths = [max_model_len] * (tokens // max_model_len)
        lengths += [tokens % max_model_len] if tokens % max_model_len else []
        pages = -(-max_model_len // config.block_size)
        zeros = torch.zeros(tokens, dtype=torch.int64, device=device)
        metadata = build_attention_metadata(
            [[0] * pages for _ in lengths], lengths, lengths, config.block_size, device
        )
        try:
            with self._ranks.lockstep(), torch.inference_mode():
                hidden = decoder.forward(zeros, zeros, cache.layers, [metadata] * len(cache.layers))
                decoder.logits(hidden[: config.max_num_seqs]).float().softmax(-1)
            torch.cuda.synchronize(device)
        except torch.OutOfMemoryError as error:
            raise EnvironmentLacks(
                f"a step of max_num_batched_tokens={tokens} does not fit the memory of {device}: "
                "lower max_num_batched_tokens"
            ) from error
        del hidden, cache
        activations = torch.cuda.max_memory_allocated(device) - before
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        return int(total * config.gpu_memory_utilization) - (total - free) - activations

    def _synchronize(self) -> None:
        if self.decoder.device.type == "cuda":
            torch.cuda.synchronize(self.decoder.device)


def set_threads(config: EngineConfig, device: torch.device, num_ranks: int) -> None:
    """On a CPU: as many threads as asked for, or as there are cores, divided among the ranks."""
    if device.type == "cpu":
        threads = max(1, (config.num_threads or len(os.sched_getaffinity(0))) // num_ranks)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
