"""The calibration walk: layer by layer, each quantized for the inputs that it will really get.

As in Frantar et al. 2022 (GPTQ), section 4: the windows' hidden states go through one block in
floating point, which tells what enters each linear layer; the block is quantized; they go through
the quantized block and are the next one's inputs. So a layer makes up for what those before it
lost, and memory holds one layer's floats and statistics beside the windows' hidden states.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.checkpoints.source import TensorSource
from engine.errors import ModelError
from engine.kv_cache import KVCache
from engine.models.block import Layer, Observer, run_block
from engine.models.decoder import embed
from engine.models.load_decoder import LayerReader
from engine.models.rope import layer_tables
from engine.models.spec import DecoderSpec
from engine.quantize.folding import LayerFloats
from engine.quantize.forms import LinearForm
from engine.quantize.overlay import Overlay
from engine.quantize.quantize_layer import Recipe, quantize_layer
from engine.quantize.statistics import InputStatistics
from kernels.metadata import AttentionMetadata, build_attention_metadata

_BLOCK_SIZE = 16
# Tokens that go through a block at once: enough to keep the matmuls busy.
_TOKENS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class QuantizedLayer:
    """What became of block `index`.

    `forms` by the prefix of each linear layer of the checkpoint ("model.layers.3.mlp.up_proj");
    `tensors` are the float tensors that changed too (norm weights, biases), by name and in the
    checkpoint's dtype. `notes` are sentences on what was done otherwise than asked.
    """

    index: int
    forms: dict[str, LinearForm]
    tensors: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)


def cut_windows(token_ids: list[int], length: int, most: int | None = None) -> Tensor:
    """int64 [windows, length] of a text's tokens, evenly spread; a shorter rest is left out.

    Raises:
        ValueError: the text does not fill one window.
    """
    count = len(token_ids) // length
    if count == 0:
        raise ValueError(
            f"the calibration text has {len(token_ids)} tokens and fills no window of {length}"
        )
    windows = torch.tensor(token_ids[: count * length]).view(count, length)
    if most is None or count <= most:
        return windows
    return windows[torch.linspace(0, count - 1, most).round().long()]


def quantize_layers(
    source: TensorSource,
    spec: DecoderSpec,
    windows: Tensor,
    recipe: Recipe,
    dtype: torch.dtype,
    device: torch.device,
    first_layer: int = 0,
    written: TensorSource | None = None,
) -> Iterator[QuantizedLayer]:
    """Quantize a model's blocks in order, from `first_layer` on.

    windows: int64 [W, L] token ids. To go on after an interruption, `written` gives the layers
    before `first_layer` as they were written: the windows go through them again, which is all the
    state there is. A method that needs no calibration runs no block.

    Raises:
        ModelError: a tensor is missing or unreadable, or weights or activations hold NaN.
    """
    walk = None
    if recipe.needs_inputs:
        walk = _Walk(source, spec, windows, dtype, device)
        for index in range(first_layer):
            walk.run(index, written if written is not None else source)
    for index in range(first_layer, spec.num_layers):
        floats = LayerFloats(source, spec, index, device)
        statistics: dict[str, InputStatistics] = {}
        if walk is not None:
            observe = _collector(index, statistics, recipe.needs_gram)
            walk.run(index, source, observe)
        notes: list[str] = []
        forms = quantize_layer(spec, floats, statistics, recipe, notes)
        layer = QuantizedLayer(
            index, forms, floats.changed, [f"layer {index}: {note}" for note in notes]
        )
        del floats, statistics
        if walk is not None:
            walk.run(index, Overlay(source, layer.forms, layer.tensors), keep=True)
        source.release()
        yield layer


class _Walk:
    """The windows' hidden states before a block, and how to take them through it."""

    def __init__(
        self,
        source: TensorSource,
        spec: DecoderSpec,
        windows: Tensor,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._spec = spec
        self._dtype = dtype
        self._device = device
        count, self._length = windows.shape
        self._at_once = min(count, max(1, _TOKENS_AT_ONCE // self._length))
        blocks = -(-self._length // _BLOCK_SIZE)
        one_layer = _one_layer(spec)
        self._cache = KVCache.allocate(
            one_layer, blocks * self._at_once, _BLOCK_SIZE, dtype, device
        ).layers[0]
        self._tables = layer_tables(spec, self._length, device)
        self._blocks = blocks
        embedding = self._reader(source).embedding_and_head()[0]
        with torch.inference_mode():
            self._hidden = [
                embed(spec, embedding, part.flatten().to(device))
                for part in torch.split(windows, self._at_once)
            ]
        source.release()

    def run(
        self,
        index: int,
        source: TensorSource,
        observe: Observer | None = None,
        keep: bool | None = None,
    ) -> None:
        """All windows through block `index` of `source`; the outputs become the hidden states.

        With `observe` alone they do not: the inputs are wanted again.
        """
        layer = self._reader(source).layer(index)
        keep = observe is None if keep is None else keep
        with torch.inference_mode():
            for place, hidden in enumerate(self._hidden):
                x, residual = self._block(index, layer, hidden.clone(), observe)
                if keep:
                    self._hidden[place] = residual.add_(x)

    def _reader(self, source: TensorSource) -> LayerReader:
        return LayerReader(source, self._spec, self._dtype, self._device)

    def _block(
        self, index: int, layer: Layer, hidden: Tensor, observe: Observer | None
    ) -> tuple[Tensor, Tensor]:
        count = len(hidden) // self._length
        positions = torch.arange(self._length, device=self._device).repeat(count)
        return run_block(
            self._spec,
            index,
            layer,
            None,
            hidden,
            positions,
            self._tables[index],
            self._cache,
            self._metadata(count),
            observe,
        )

    def _metadata(self, count: int) -> AttentionMetadata:
        tables = [
            list(range(place * self._blocks, (place + 1) * self._blocks)) for place in range(count)
        ]
        lengths = [self._length] * count
        return build_attention_metadata(tables, lengths, lengths, _BLOCK_SIZE, self._device)


def _one_layer(spec: DecoderSpec) -> DecoderSpec:
    return dataclasses.replace(spec, num_layers=1, layer_windows=spec.layer_windows[:1])


def _collector(index: int, statistics: dict[str, InputStatistics], with_gram: bool) -> Observer:
    def observe(name: str, rows: Tensor) -> None:
        if name not in statistics:
            statistics[name] = InputStatistics(rows.shape[1], rows.device, with_gram)
        try:
            statistics[name].add(rows)
        except ValueError as error:
            raise ModelError(f"layer {index}, what enters {name}: {error}") from error

    return observe
