"""The parts of a decoder's step as they would be under other knobs, on random data.

Linear layers in the form that a quantization method gives them, and attention over a cache of any
dtype. Weights and caches are those of as many layers as a step goes through, up to a limit beyond
which no cache of the device holds them: so each layer meets the memory as it does in a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from engine.models.block import Layer, Mlp
from engine.models.decoder import Decoder
from engine.models.experts import Experts, run_experts
from engine.models.load_decoder import owned
from engine.quantize import forms
from engine.quantize.methods import quantize_head, quantize_weight
from engine.tunable_operations import random_cache
from kernels import ops
from kernels.layer_cache import LayerCache
from kernels.metadata import AttentionMetadata, build_attention_metadata
from kernels.ops import ConcatWeight, Int8Weight, LinearWeight, pack_dense

# Copies of weights, or of caches, that no cache holds: server CPUs have up to some hundred
# megabytes of L3, GPUs tens of L2.
MOST_BYTES = 512 << 20
# Pages that are drawn at random and repeated; drawing all would take longer than the measurement.
DRAWN_PAGES = 64


@dataclass(frozen=True, slots=True)
class RandomRows:
    """Random activations of `rows` tokens in the model's dtype, drawn once for each width.

    Where a kernel's speed depends on outliers, `observed` has real ones for each kind of layer.
    """

    decoder: Decoder
    rows: int
    drawn: dict[int, Tensor] = field(default_factory=dict)
    observed: Mapping[str, Tensor] = field(default_factory=dict)

    def entering(self, name: str, width: int) -> Tensor:
        """[rows, width] for the kind of layer `name`."""
        if name not in self.observed:
            return self.of_width(width)
        seen = self.observed[name]
        return seen.repeat(-(-self.rows // len(seen)), 1)[: self.rows]

    def with_observed(self, observed: Mapping[str, Tensor]) -> RandomRows:
        """The same, with what really enters the layers."""
        return RandomRows(self.decoder, self.rows, self.drawn, observed)

    def of_width(self, width: int) -> Tensor:
        """[rows, width]."""
        if width not in self.drawn:
            self.drawn[width] = _random(self.decoder, self.rows, width)
        return self.drawn[width]


@dataclass(frozen=True, slots=True)
class LinearLayers:
    """Linear layers of a model in one form: `layers` of its `num_layers`, and its head.

    `layers` are qkv, output and the MLP each; `nbytes` are those of one layer.
    """

    method: str
    layers: list[tuple[LinearWeight, LinearWeight, Mlp | Experts]]
    head: LinearWeight
    num_layers: int

    @property
    def outlier_threshold(self) -> float:
        """The magnitude from which on activations are split off; 0 where none are."""
        weight = self.layers[0][0]
        part = weight.parts[0] if isinstance(weight, ConcatWeight) else weight
        return part.outlier_threshold if isinstance(part, Int8Weight) else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of the weights of one layer."""
        qkv, output, mlp = self.layers[0]
        return qkv.nbytes + output.nbytes + mlp.nbytes

    def runs(self, inputs: RandomRows) -> list[Callable[[], Tensor]]:
        """One for each layer here: its linear layers over the rows."""
        spec = inputs.decoder.spec
        x = inputs.entering("qkv", spec.hidden_size)
        attended = inputs.entering("output", spec.num_heads * spec.head_dim)
        # Mixtures of experts tell other names; their rows are random.
        before_mlp = inputs.entering("gate_up", spec.hidden_size)
        plain = [mlp for _, _, mlp in self.layers if isinstance(mlp, Mlp)]
        inner = inputs.entering("down", plain[0].down.shape[1]) if plain else x

        def run(qkv: LinearWeight, output: LinearWeight, mlp: Mlp | Experts) -> Tensor:
            ops.linear(x, qkv)
            ops.linear(attended, output)
            if isinstance(mlp, Experts):
                return run_experts(spec, mlp, before_mlp)
            ops.linear(before_mlp, mlp.gate_up)
            return ops.linear(inner, mlp.down)

        return [partial(run, *layer) for layer in self.layers]

    def head_run(self, inputs: RandomRows) -> Callable[[], Tensor]:
        """The output head over the rows."""
        return partial(ops.linear, inputs.of_width(inputs.decoder.spec.hidden_size), self.head)


def own_layers(decoder: Decoder, method: str) -> LinearLayers:
    """The linear layers that the decoder is served with."""
    layers = [(layer.qkv, layer.output, layer.mlp) for layer in decoder.layers]
    return LinearLayers(method, layers, decoder.head, len(layers))


def random_layers(decoder: Decoder, method: str) -> LinearLayers:
    """Random weights of the same shapes, in the form of a method that needs no calibration.

    Values are drawn once a shape, as no kernel's speed depends on them; memory is each layer's own.
    """
    known: dict[tuple[int, int], forms.LinearForm] = {}

    def weight(like: LinearWeight) -> LinearWeight:
        shape = like.shape
        if shape not in known:
            known[shape] = quantize_weight(_random(decoder, *shape) * 0.05, method)
        bias = None if like.bias is None else torch.zeros_like(like.bias)
        return forms.pack([owned(known[shape])], bias, decoder.dtype)

    def mlp(like: Mlp | Experts) -> Mlp | Experts:
        if isinstance(like, Mlp):
            return Mlp(weight(like.gate_up), weight(like.down))
        pairs = zip(like.gate_up, like.down, strict=True)
        return Experts.of(like.router, [(weight(gate), weight(down)) for gate, down in pairs])

    def made(layer: Layer) -> tuple[LinearWeight, LinearWeight, Mlp | Experts]:
        return weight(layer.qkv), weight(layer.output), mlp(layer.mlp)

    layers, taken = [], 0
    for layer in decoder.layers:
        layers.append(made(layer))
        taken += sum(part.nbytes for part in layers[-1])
        if taken > MOST_BYTES:
            break
    vocabulary, hidden = decoder.head.shape
    drawn = _random(decoder, min(vocabulary, 1024), hidden) * 0.05
    drawn = drawn.repeat(-(-vocabulary // len(drawn)), 1)[:vocabulary]
    form = quantize_head(drawn, method)
    head = (
        pack_dense(form.weight.clone())
        if isinstance(form, forms.DenseForm)
        else forms.pack([form], None, decoder.dtype)
    )
    return LinearLayers(method, layers, head, len(decoder.layers))


@dataclass(frozen=True, slots=True)
class AttentionLayers:
    """Caches of `num_layers` layers, or of some of them, with `pages` of random tokens each."""

    caches: list[LayerCache]
    num_layers: int
    pages: int
    block_size: int

    @classmethod
    def make(
        cls, decoder: Decoder, dtype: torch.dtype, block_size: int, tokens: int
    ) -> AttentionLayers:
        """Caches for `tokens` tokens in all, or fewer of more layers where memory is the limit."""
        spec = decoder.spec
        per_token = 2 * spec.num_kv_heads * spec.head_dim * dtype.itemsize
        pages = max(1, -(-tokens // block_size))
        layers = min(spec.num_layers, max(1, MOST_BYTES // (pages * block_size * per_token)))
        shape = (pages, spec.num_kv_heads, block_size, spec.head_dim)
        few = (min(pages, DRAWN_PAGES), *shape[1:])
        drawn = random_cache(few, dtype, decoder.device)
        caches = [_repeated(drawn, shape, decoder.device) for _ in range(layers)]
        return cls(caches, spec.num_layers, pages, block_size)

    def runs(
        self, decoder: Decoder, query_lens: Sequence[int], context: int
    ) -> list[Callable[[], Tensor]]:
        """One for each layer here: attention of sequences with `context` tokens each.

        Each sequence computes its last `query_lens[i]` tokens. Layers with windows see all.
        """
        spec = decoder.spec
        metadata = self._metadata(decoder, query_lens, context)
        q = _random(decoder, sum(query_lens), spec.num_heads * spec.head_dim)
        q = q.view(-1, spec.num_heads, spec.head_dim)

        def run(cache: LayerCache) -> Tensor:
            return ops.paged_attention(
                q, cache, metadata, spec.attention_scale, 0, spec.attention_soft_cap
            )

        return [partial(run, cache) for cache in self.caches]

    def _metadata(
        self, decoder: Decoder, query_lens: Sequence[int], context: int
    ) -> AttentionMetadata:
        """Sequences on pages in random order; those beyond the memory's share pages."""
        length = -(-context // self.block_size)
        wanted = len(query_lens) * length
        rounds = -(-wanted // self.pages)
        pages = torch.cat([torch.randperm(self.pages) for _ in range(rounds)])[:wanted]
        return build_attention_metadata(
            pages.view(len(query_lens), length).tolist(),
            query_lens,
            [context] * len(query_lens),
            self.block_size,
            decoder.device,
        )


def _repeated(
    drawn: LayerCache, shape: tuple[int, int, int, int], device: torch.device
) -> LayerCache:
    """A cache of its own memory with the drawn pages over and over."""
    cache = LayerCache.allocate(shape, drawn.keys.dtype, device)
    pairs = (
        (cache.keys, drawn.keys),
        (cache.values, drawn.values),
        (cache.key_scales, drawn.key_scales),
        (cache.value_scales, drawn.value_scales),
    )
    for whole, part in pairs:
        if whole is not None and part is not None:
            for target in torch.split(whole, len(part)):
                target.copy_(part[: len(target)])
    return cache


def _random(decoder: Decoder, rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, device=decoder.device).to(decoder.dtype)
