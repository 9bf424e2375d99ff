"""A decoder on its KV cache: computes packed steps, from captured graphs where it can."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from engine.batch import Batch
from engine.block_groups import BlockGroup, block_groups, group_of_layer
from engine.config import EngineConfig
from engine.cpu_cache_budget import cpu_cache_budget
from engine.cuda_capture import CudaCapture
from engine.device_memory import CudaMemory, DeviceMemory, measure_use
from engine.errors import EnvironmentLacks
from engine.graph_sizes import DecodeShape, decode_shapes, most_sequences
from engine.graphs import Capture, DecodeGraphs, NotCapturable, Scores
from engine.kv_cache import KVCache, cache_dtype
from engine.models.decoder import Decoder
from engine.models.spec import DecoderSpec
from engine.packed_step import StepBuffer, StepHeader, StepTensors
from engine.parallel import all_or_none
from engine.step_inputs import TABLE_MULTIPLE, table_width
from kernels.backends import backend_for
from kernels.layer_cache import LayerCache
from kernels.metadata import AttentionMetadata, build_attention_metadata
from kernels.triton import runtime


class ForwardPass:
    """One rank's decoder with its KV cache.

    Args:
        decoder: the model.
        make_capture: makes what captures graphs; by default CUDA on a GPU, else there are none.
        memory: the device's memory; by default CUDA's on a GPU.

    `allocate` before anything is run. `notes` are sentences on what does not run as it was asked.
    """

    def __init__(
        self,
        decoder: Decoder,
        make_capture: Callable[[], Capture] | None = None,
        memory: DeviceMemory | None = None,
    ) -> None:
        device = decoder.device
        self.decoder = decoder
        self.notes: list[str] = []
        self._graphs: DecodeGraphs | None = None
        if device.type == "cuda":
            make_capture = make_capture or partial(CudaCapture, device)
            memory = memory or CudaMemory(device)
        self._make_capture = make_capture
        self._memory = memory

    def measures(self, config: EngineConfig) -> bool:
        """Whether the KV cache is sized by what steps are measured to need."""
        return self._memory is not None and config.kv_cache_memory_bytes is None

    def cache_budget(
        self,
        config: EngineConfig,
        max_model_len: int,
        sample: Callable[[Tensor], object] | None = None,
    ) -> int:
        """Bytes for the KV cache.

        As asked; else on a GPU what `gpu_memory_utilization` leaves beside what is measured to be
        needed, with `sample` of logits [S, vocabulary]. No cache may be allocated.

        Raises:
            EnvironmentLacks: the largest step does not fit.
        """
        if config.kv_cache_memory_bytes is not None:
            return config.kv_cache_memory_bytes
        memory = self._memory
        if memory is None:
            return cpu_cache_budget() // self.decoder.ranks.size
        decoder = self.decoder
        groups = self._set_length(max_model_len)
        dtype = cache_dtype(config, decoder.dtype)
        shapes = self._shapes(config) if self._captures(config) else []
        try:
            cache = KVCache.allocate(decoder.spec, 1, config.block_size, dtype, decoder.device)
            with decoder.ranks.lockstep(), torch.inference_mode():
                use = measure_use(
                    memory,
                    partial(self._largest_step, config, max_model_len, cache, sample),
                    partial(self._probe, config, max_model_len, cache, groups) if shapes else None,
                    len(shapes),
                )
        except torch.OutOfMemoryError as error:
            raise EnvironmentLacks(
                f"a step of max_num_batched_tokens={config.max_num_batched_tokens} tokens and "
                f"{most_sequences(config)} sequences does not fit the memory of {decoder.device} "
                "beside the weights: lower max_num_batched_tokens or max_num_seqs"
            ) from error
        return use.cache_budget(config.gpu_memory_utilization)

    def allocate(self, config: EngineConfig, max_model_len: int, num_blocks: int) -> None:
        """Take the KV cache and capture the decode steps over it.

        Raises:
            EnvironmentLacks: no memory; nothing is held then.
        """
        decoder = self.decoder
        groups = self._set_length(max_model_len)
        dtype = cache_dtype(config, decoder.dtype)
        self.cache = all_or_none(
            decoder.ranks,
            lambda: KVCache.allocate(
                decoder.spec, num_blocks, config.block_size, dtype, decoder.device, groups
            ),
        )
        self.groups = groups
        self._layer_group = group_of_layer(groups)
        self.notes = []
        if not self._captures(config):
            return
        shapes = self._shapes(config)
        try:
            with decoder.ranks.lockstep(), torch.inference_mode():
                self._graphs = self._capture(
                    config, max_model_len, self.cache, self._layer_group, shapes
                )
        except EnvironmentLacks:
            self.release()
            raise
        if self._graphs is None:
            return
        missing = len(shapes) - len(self._graphs.shapes)
        if missing:
            self.notes.append(
                f"{missing} of {len(shapes)} CUDA graphs did not fit the memory: decode steps of "
                f"up to {self._graphs.sizes[-1]} sequences have them"
            )

    def release(self) -> None:
        """Give the KV cache and the graphs back."""
        self.release_graphs()
        del self.cache

    def release_graphs(self) -> None:
        """Give the graphs back: steps run without them until the next `allocate`."""
        self._graphs = None

    @property
    def most_captured(self) -> int:
        """Sequences of the largest captured decode step; 0 if none is."""
        return 0 if self._graphs is None else self._graphs.sizes[-1]

    def shape_for(self, batch: Batch) -> DecodeShape | None:
        """What a step of decodes is to be padded to; None is not at all."""
        if self._graphs is None or batch.num_decodes < len(batch.sequences):
            return None
        longest = max(sequence.num_tokens for sequence in batch.sequences)
        return self._graphs.shape_for(batch.num_decodes, longest)

    def run(self, header: StepHeader, buffer: StepBuffer) -> Scores | None:
        """Compute a step; None if nothing samples. Does not wait for a GPU.

        A step of decodes that has a captured shape runs from its graph: sequences of context 0 are
        padding then.
        """
        graphs = self._graphs
        if graphs is not None and graphs.holds(header):
            return graphs.run(header, buffer)
        step = buffer.tensors(header)
        return scores_of(self.decoder, self.cache, self._layer_group, step)

    def _set_length(self, max_model_len: int) -> tuple[BlockGroup, ...]:
        self.decoder.set_max_position(max_model_len)
        return block_groups(self.decoder.spec.layer_windows, max_model_len)

    def _shapes(self, config: EngineConfig) -> list[DecodeShape]:
        has_windows = any(self.decoder.spec.layer_windows)
        return decode_shapes(config, has_windows=has_windows)

    def _captures(self, config: EngineConfig) -> bool:
        return config.cuda_graphs and self._make_capture is not None

    def _capture(
        self,
        config: EngineConfig,
        max_model_len: int,
        cache: KVCache,
        layer_group: Sequence[int],
        shapes: Sequence[DecodeShape],
    ) -> DecodeGraphs | None:
        """Graphs of decode steps over a cache that holds nothing yet.

        None, with a note, if some operation is not made for them.

        Raises:
            EnvironmentLacks: no memory for a single one.
        """
        assert self._make_capture is not None
        decoder = self.decoder

        # Without `self`: the graphs belong to it, and a cycle would keep the device's memory until
        # the next garbage collection.
        def forward(step: StepTensors) -> Scores:
            scores = scores_of(decoder, cache, layer_group, step)
            assert scores is not None
            return scores

        try:
            check_capturable(decoder.spec, cache.layers[0], decoder.dtype)
            return DecodeGraphs(
                forward,
                shapes,
                max(layer_group) + 1,
                table_width(max_model_len, config.block_size, TABLE_MULTIPLE),
                self.decoder.device,
                self._make_capture(),
                # Ranks that capture different steps would wait for each other for ever.
                leave_out=decoder.ranks.size == 1,
            )
        except NotCapturable as reason:
            self.notes = [f"decode steps run without CUDA graphs: {reason}"]
            return None

    def _probe(
        self,
        config: EngineConfig,
        max_model_len: int,
        cache: KVCache,
        groups: Sequence[BlockGroup],
        count: int,
    ) -> DecodeGraphs | None:
        """The `count` largest graphs, for what they take."""
        shapes = sorted(self._shapes(config), key=lambda shape: shape.num_tokens)[-count:]
        return self._capture(config, max_model_len, cache, group_of_layer(groups), shapes)

    def _largest_step(
        self,
        config: EngineConfig,
        max_model_len: int,
        cache: KVCache,
        sample: Callable[[Tensor], object] | None,
    ) -> None:
        """A step of the most tokens over a cache of one block, which all sequences share."""
        decoder, device = self.decoder, self.decoder.device
        tokens = config.max_num_batched_tokens
        lengths = [max_model_len] * (tokens // max_model_len)
        lengths += [tokens % max_model_len] if tokens % max_model_len else []
        pages = -(-max_model_len // config.block_size)
        zeros = torch.zeros(tokens, dtype=torch.int64, device=device)
        metadata = build_attention_metadata(
            [[0] * pages for _ in lengths], lengths, lengths, config.block_size, device
        )
        hidden = decoder.forward(zeros, zeros, cache.layers, [metadata] * len(cache.layers))
        logits = decoder.logits(hidden[: most_sequences(config)])
        if sample is not None:
            sample(logits)


def scores_of(
    decoder: Decoder, cache: KVCache, layer_group: Sequence[int], step: StepTensors
) -> Scores | None:
    """What a step over a cache says of the next tokens; None if nothing samples."""
    metadata = [step.layouts[group] for group in layer_group]
    hidden = decoder.forward(step.token_ids, step.positions, cache.layers, metadata)
    if not len(step.last):
        return None
    if len(step.last) != len(hidden):
        hidden = hidden[step.last]
    return Scores(decoder.logits(hidden), hidden)


def check_capturable(spec: DecoderSpec, cache: LayerCache, dtype: torch.dtype) -> None:
    """Check that a padded decode step leaves the cache alone and reads nothing from the host.

    The kernels see to that; plain PyTorch, which does what they decline, does not.

    Raises:
        NotCapturable: an operation has no kernel.
    """
    device = cache.keys.device
    heads, kv_heads = spec.num_heads, spec.num_kv_heads
    qkv = torch.zeros((1, heads + 2 * kv_heads, spec.head_dim), dtype=dtype, device=device)
    if not runtime.runs_on(qkv):
        raise NotCapturable(runtime.status(device).reason)
    backend = backend_for(qkv)
    q, k, v = qkv.split_with_sizes([heads, kv_heads, kv_heads], dim=1)
    slots = torch.full((1,), -1, dtype=torch.int64, device=device)
    if not backend.write_kv(k, v, cache, slots):
        raise NotCapturable(f"no kernel writes a cache of {cache.keys.dtype} from {dtype}")
    padding = AttentionMetadata(
        block_tables=torch.zeros((1, 16), dtype=torch.int32, device=device),
        context_lens=torch.zeros(1, dtype=torch.int32, device=device),
        query_start=torch.tensor([0, 1], dtype=torch.int32, device=device),
        slots=slots,
        query_lens=[1],
        context_lens_list=[0],
        num_decodes=1,
    )
    for window in sorted(set(spec.layer_windows)):
        attended = backend.paged_attention(
            q, cache, padding, spec.attention_scale, window, spec.attention_soft_cap
        )
        if attended is None:
            raise NotCapturable(f"no kernel for attention with heads of {spec.head_dim}")
