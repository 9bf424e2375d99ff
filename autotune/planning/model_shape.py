"""A model's arithmetic from its sizes alone: parameters, bytes of weights, bytes of cached tokens.

Wider than what the engine serves: a plan may be for a model with latent attention or with experts
of a kind that has no decoder here. `autotune.planning.read_shape` reads a config.json into it.
Where the engine does serve the model, these numbers equal `autotune.profiling.model_facts`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from autotune.planning.stored_weights import StoredWeights
from engine.quantize.weight_size import linear_bytes

Cut = Literal["rows", "columns", "whole"]
# One number, or as many as there are rows in a table.
Amount = TypeVar("Amount", float, NDArray[np.float64])

CACHE_ITEM_BYTES = {"int8": 1, "fp8": 1}
# A quantized cache holds a float32 scale for the key and the value of each head of each token.
_CACHE_SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-AI 2024, "DeepSeek-V2", section 2.1), in elements.

    What is cached of a token is its latent of `kv_rank` and a key of `rope_dim` that turns, both
    shared by all heads. `query_rank` is 0 where queries are not compressed.
    """

    kv_rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int
    query_rank: int = 0


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts in place of the MLP of some layers.

    A token meets `top_k` of `num_experts`, and in any case the shared ones, whose inner features
    are `shared_size` together. `layers` says which layers have experts.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    layers: tuple[bool, ...]
    shared_size: int = 0
    shared_gate: bool = False

    def touched(self, rows: Amount) -> Amount:
        """Experts that `rows` tokens meet together, if a token is as likely to meet any.

        E * (1 - (1 - k/E)^B): each of B tokens leaves an expert out with a chance of 1 - k/E.
        """
        missed = 1.0 - self.top_k / self.num_experts
        met: Amount = self.num_experts * (1.0 - missed**rows)
        return met


class Linear(NamedTuple):
    """A matrix product of a layer: `rows` output and `columns` input features.

    `cut` says how tensor parallelism divides it; `copies` are the experts that have one each.
    """

    name: str
    rows: int
    columns: int
    cut: Cut
    copies: int = 1

    def shard(self, ranks: int) -> Linear:
        """One rank's part, of the ranks that have most."""
        if self.cut == "rows":
            return self._replace(rows=-(-self.rows // ranks))
        if self.cut == "columns":
            return self._replace(columns=-(-self.columns // ranks))
        return self


class LayerKind(NamedTuple):
    """Layers that are alike, and how many."""

    has_experts: bool
    window: int
    layers: int


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a decoder; they count elements, `max_position` tokens.

    - `layer_windows`: for each layer the tokens that a token sees, itself included; 0 means all.
    - `gated`: the MLP has a gate beside the up projection.
    - `qkv_bias`, `output_bias`, `mlp_bias`: which linear layers have biases.
    - `norms`: weights of all norms of one layer.
    - `position_embeddings`: rows of a learned table of positions.
    - `latent`: None unless keys and values are cached as one latent.
    - `experts`: None where every layer has a plain MLP.
    - `stored`: how the checkpoint's linear layers are quantized; None: they are floats.
    - `notes`: sentences on what of the config is not counted.
    """

    name: str
    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    tie_word_embeddings: bool
    dtype: str
    layer_windows: tuple[int, ...]
    gated: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    norms: int = 0
    position_embeddings: int = 0
    latent: LatentAttention | None = None
    experts: Experts | None = None
    stored: StoredWeights | None = None
    notes: tuple[str, ...] = ()

    @property
    def dtype_bytes(self) -> int:
        """Bytes of a weight that is not quantized."""
        return 4 if self.dtype == "float32" else 2

    @property
    def head_parameters(self) -> int:
        """Weights of the output head."""
        return self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """Parameters, a tied output head counted once."""
        embeddings = self.head_parameters * (1 if self.tie_word_embeddings else 2)
        return self._matrix_parameters() + self._rest_parameters() + embeddings

    @property
    def matmul_parameters(self) -> int:
        """Parameters that a token meets in matrix products, the output head aside."""
        total = 0
        for kind in self.layer_kinds():
            for linear in self.linears(kind.has_experts):
                met = min(linear.copies, self._top_k) if linear.copies > 1 else 1
                total += kind.layers * met * linear.rows * linear.columns
            if kind.has_experts:
                total += kind.layers * self._router_parameters()
        return total

    @property
    def active_parameters(self) -> int:
        """Parameters that a token meets, output head included (the "A3B" of a model's name)."""
        return self.matmul_parameters + self.head_parameters

    def layer_kinds(self) -> list[LayerKind]:
        """The layers, alike ones together."""
        expert_layers = self.experts.layers if self.experts else (False,) * self.num_layers
        counted = Counter(zip(expert_layers, self.layer_windows, strict=True))
        return [LayerKind(has, window, count) for (has, window), count in sorted(counted.items())]

    def linears(self, has_experts: bool) -> Iterator[Linear]:
        """The matrix products of a layer, in the order in which they run; routers aside."""
        hidden = self.hidden_size
        yield from self._attention_linears()
        ups = 2 if self.gated else 1
        if not has_experts or self.experts is None:
            yield Linear("gate_up", ups * self.intermediate_size, hidden, "rows")
            yield Linear("down", hidden, self.intermediate_size, "columns")
            return
        experts = self.experts
        if experts.shared_size:
            yield Linear("shared.gate_up", ups * experts.shared_size, hidden, "rows")
            yield Linear("shared.down", hidden, experts.shared_size, "columns")
        count, inner = experts.num_experts, experts.intermediate_size
        yield Linear("experts.gate_up", ups * inner, hidden, "rows", count)
        yield Linear("experts.down", hidden, inner, "columns", count)

    def linear_weight_bytes(self, linear: Linear, quantization: str) -> int:
        """Bytes of one copy of a linear layer with its scales."""
        if quantization == "none" and self.stored is not None:
            return self.stored.bytes(linear.rows, linear.columns)
        return linear_bytes(linear.rows, linear.columns, quantization, self.dtype_bytes)

    def weight_bytes(self, quantization: str = "none", ranks: int = 1) -> int:
        """Bytes of the weights that one of `ranks` tensor-parallel ranks holds.

        Raises:
            KeyError: a quantization that does not exist.
        """
        linear = sum(
            kind.layers * part.copies * self.linear_weight_bytes(part.shard(ranks), quantization)
            for kind in self.layer_kinds()
            for part in self.linears(kind.has_experts)
        )
        # Norms, biases and routers stay in floats, on every rank.
        rest = self._rest_parameters() * self.dtype_bytes
        embeddings = -(-self.head_parameters // ranks) * self.dtype_bytes
        shared = self.tie_word_embeddings and quantization == "none"
        head = 0 if shared else self.head_bytes(quantization, ranks)
        return linear + rest + embeddings + head

    def head_bytes(self, quantization: str = "none", ranks: int = 1) -> int:
        """Bytes of the output head that one rank reads; the engine's quantized one is int8."""
        rows = -(-self.vocab_size // ranks)
        method = "none" if quantization == "none" else "int8"
        return linear_bytes(rows, self.hidden_size, method, self.dtype_bytes)

    def kv_heads_per_rank(self, ranks: int) -> int:
        """Key/value heads that one rank holds; where there are fewer than ranks, they repeat."""
        return max(1, -(-self.num_kv_heads // ranks))

    def layer_kv_bytes(self, kv_cache_dtype: str = "auto", ranks: int = 1) -> int:
        """Bytes that a token takes in the cache of one layer, on one rank.

        A latent has no heads to divide: every rank holds it whole.
        """
        item = CACHE_ITEM_BYTES.get(kv_cache_dtype, self.dtype_bytes)
        scale = _CACHE_SCALE_BYTES if kv_cache_dtype in CACHE_ITEM_BYTES else 0
        if self.latent is not None:
            return (self.latent.kv_rank + self.latent.rope_dim) * item + 2 * scale
        return 2 * self.kv_heads_per_rank(ranks) * (self.head_dim * item + scale)

    def kv_bytes_per_token(self, kv_cache_dtype: str = "auto", ranks: int = 1) -> int:
        """Bytes that a token takes in the caches of all layers, on one rank."""
        return self.num_layers * self.layer_kv_bytes(kv_cache_dtype, ranks)

    def pair_flops(self, ranks: int = 1) -> float:
        """Floating-point operations of one layer for a pair of query and key, in prompt chunks."""
        heads = -(-self.num_heads // ranks)
        if self.latent is not None:
            latent = self.latent
            return 2.0 * heads * (latent.nope_dim + latent.rope_dim + latent.value_dim)
        return 4.0 * heads * self.head_dim

    def decode_token_flops(self, ranks: int = 1) -> float:
        """Those of one layer for a cached token that a decode sees.

        With a latent cache the up projections are absorbed into query and output, so that every
        head looks at the whole latent.
        """
        if self.latent is None:
            return self.pair_flops(ranks)
        heads = -(-self.num_heads // ranks)
        return 2.0 * heads * (2 * self.latent.kv_rank + self.latent.rope_dim)

    def obstacle(self, ranks: int) -> str | None:
        """Why the model cannot be divided among so many ranks; None if it can."""
        if ranks == 1:
            return None
        inner = []
        if self.experts is None or not all(self.experts.layers):
            inner.append(("MLP features", self.intermediate_size))
        if self.experts is not None:
            inner.append(("features of an expert", self.experts.intermediate_size))
        for title, count in [("attention heads", self.num_heads), *inner]:
            if count % ranks:
                return f"{ranks} GPUs do not divide the model's {count} {title}"
        heads = self.num_kv_heads
        if self.latent is None and heads % ranks and ranks % heads:
            return f"{ranks} GPUs and the model's {heads} key/value heads do not divide one another"
        return None

    @property
    def _top_k(self) -> int:
        return self.experts.top_k if self.experts else 0

    def _attention_linears(self) -> Iterator[Linear]:
        hidden, heads = self.hidden_size, self.num_heads
        if self.latent is None:
            rows = (heads + 2 * self.num_kv_heads) * self.head_dim
            yield Linear("qkv", rows, hidden, "rows")
            yield Linear("output", hidden, heads * self.head_dim, "columns")
            return
        latent = self.latent
        query = heads * (latent.nope_dim + latent.rope_dim)
        # The first projections of query and latent read the same input: one product.
        yield Linear(
            "latent", latent.query_rank + latent.kv_rank + latent.rope_dim, hidden, "whole"
        )
        yield Linear("query", query, latent.query_rank or hidden, "rows")
        yield Linear(
            "key_value", heads * (latent.nope_dim + latent.value_dim), latent.kv_rank, "rows"
        )
        yield Linear("output", hidden, heads * latent.value_dim, "columns")

    def _matrix_parameters(self) -> int:
        return sum(
            kind.layers * part.copies * part.rows * part.columns
            for kind in self.layer_kinds()
            for part in self.linears(kind.has_experts)
        )

    def _router_parameters(self) -> int:
        return self.experts.num_experts * self.hidden_size if self.experts else 0

    def _rest_parameters(self) -> int:
        """Norms, biases, routers and positions."""
        total = self.hidden_size + self.position_embeddings * self.hidden_size
        ups = 2 if self.gated else 1
        for kind in self.layer_kinds():
            each = self.norms
            qkv = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
            each += qkv * self.qkv_bias + self.hidden_size * self.output_bias
            if kind.has_experts and self.experts is not None:
                each += self._router_parameters()
                each += self.hidden_size * self.experts.shared_gate
                inner, copies = self.experts.intermediate_size, self.experts.num_experts
            else:
                inner, copies = self.intermediate_size, 1
            each += copies * (ups * inner + self.hidden_size) * self.mlp_bias
            total += kind.layers * each
        return total
