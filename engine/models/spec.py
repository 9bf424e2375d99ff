"""What a decoder looks like: everything that tells one model of a family from another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding: base and, if `kind` is not default, how it is scaled.

    - `linear` divides positions by `factor`.
    - `llama3` divides low frequencies by it and leaves high ones, with a smooth passage between;
      its wavelength bounds are `original_max_position / low_freq_factor` and `/ high_freq_factor`.
    - `yarn` does so between the pairs that turn `beta_fast` and `beta_slow` times within
      `original_max_position`; `truncate` rounds these bounds to whole pairs.
    - `longrope` divides the frequency of each pair by its `short_factor`, or by its `long_factor`
      in an engine whose sequences may become longer than `original_max_position`. (transformers
      decides by each batch; a token's key, once cached, must not depend on what comes after it.)

    Lengths are in tokens. `attention_factor` multiplies cosines and sines. Only the first
    `fraction` of a head's elements turns.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    attention_factor: float = 1.0
    fraction: float = 1.0

    def rotary_dim(self, head_dim: int) -> int:
        """Elements of a head that turn."""
        return int(head_dim * self.fraction)


@dataclass(frozen=True, slots=True)
class ExpertsSpec:
    """A mixture of experts in place of the MLP of some layers.

    A router picks `top_k` of `num_experts` for each token, by the softmax over all; `normalize`
    divides the weights of those chosen by their sum. `intermediate_size` is that of each expert.
    `layers` says for each layer whether it has experts. In the checkpoint the router is
    `<layer>.<block>.gate` and the experts `<layer>.<block>.experts.<i>.<part>`, with the `parts`
    gate, up and down.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    normalize: bool
    layers: tuple[bool, ...]
    block: str = "mlp"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """Sizes and switches of one decoder; sizes count elements, `max_position` tokens.

    What every family declares comes first; what only some do has the plain Llama's value:

    - `layer_windows`: for each layer the tokens that a token sees, itself included; 0 means all.
    - `local_rope`: the rotary embedding of layers with a window, where it is another.
    - `activation`: of the gate in the MLP.
    - `attention_scale`: multiplies scores; `head_dim ** -0.5` where it is not given.
    - `attention_soft_cap`, `logit_soft_cap`: bound scores to `cap * tanh(score / cap)`; 0 is off.
    - `embedding_scale`: multiplies embeddings, rounded to the model's dtype first.
    - `qkv_bias`, `output_bias`, `mlp_bias`: which linear layers have biases.
    - `qk_norm`: queries and keys are normed by head before they are rotated.
    - `unit_norms`: norm weights are stored as their difference from 1.
    - `output_norms`: attention and MLP are normed again before they join the residual.
    - `fused_tensors`: the checkpoint holds `qkv_proj` and `gate_up_proj`, each as one tensor.
    - `experts`: None where every layer has a plain MLP.
    - `text_only`: the checkpoint also holds what sees images or hears, which is not served.
    - `roots`: prefixes of model and output head in the checkpoint; the first that is there counts.
    """

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    rms_norm_eps: float
    rope: RopeSpec
    tie_word_embeddings: bool
    checkpoint_dtype: str
    layer_windows: tuple[int, ...]
    local_rope: RopeSpec | None = None
    activation: Activation = "silu"
    attention_scale: float = 0.0
    attention_soft_cap: float = 0.0
    logit_soft_cap: float = 0.0
    embedding_scale: float = 1.0
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    unit_norms: bool = False
    output_norms: bool = False
    fused_tensors: bool = False
    experts: ExpertsSpec | None = None
    text_only: bool = False
    roots: tuple[tuple[str, str], ...] = (("model", "lm_head"),)

    def __post_init__(self) -> None:
        if not self.attention_scale:
            object.__setattr__(self, "attention_scale", self.head_dim**-0.5)

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Output features of the query, key and value projections."""
        kv = self.num_kv_heads * self.head_dim
        return self.num_heads * self.head_dim, kv, kv

    @property
    def num_parameters(self) -> int:
        """Parameters, a tied output head counted once."""
        layers = sum(self._layer_parameters(index) for index in range(self.num_layers))
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return layers + self.hidden_size + embeddings

    def has_experts(self, index: int) -> bool:
        """Whether layer `index` has experts in place of an MLP."""
        return self.experts is not None and self.experts.layers[index]

    def _layer_parameters(self, index: int) -> int:
        q, k, v = self.qkv_sizes
        hidden, inner = self.hidden_size, self.intermediate_size
        attention = hidden * (q + k + v) + q * hidden
        norms = hidden * (4 if self.output_norms else 2) + 2 * self.head_dim * self.qk_norm
        biases = (q + k + v) * self.qkv_bias + hidden * self.output_bias
        if self.experts is not None and self.experts.layers[index]:
            each = 3 * hidden * self.experts.intermediate_size + hidden
            return attention + norms + biases + self.experts.num_experts * each
        return (
            attention + norms + biases + 3 * hidden * inner + (2 * inner + hidden) * self.mlp_bias
        )
