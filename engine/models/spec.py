"""What a decoder looks like: everything that tells one model of a family from another."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding: base and, if `kind` is not default, how it is scaled.

    `linear` divides positions by `factor`. `llama3` divides low frequencies by it and leaves high
    ones, with a smooth passage between; its wavelength bounds are
    `original_max_position / low_freq_factor` and `/ high_freq_factor`, in tokens.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """Sizes and switches of one decoder; sizes count elements, `max_position` tokens.

    `layer_windows`: for each layer the tokens that a token sees, itself included; 0 means all.
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
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    checkpoint_dtype: str
    layer_windows: tuple[int, ...]

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Output features of the query, key and value projections."""
        kv = self.num_kv_heads * self.head_dim
        return self.num_heads * self.head_dim, kv, kv

    @property
    def num_parameters(self) -> int:
        """Parameters, a tied output head counted once."""
        q, k, v = self.qkv_sizes
        hidden, inner = self.hidden_size, self.intermediate_size
        attention = hidden * (q + k + v) + q * hidden
        mlp = 3 * hidden * inner
        biases = (q + k + v + hidden) * self.attention_bias + (2 * inner + hidden) * self.mlp_bias
        embeddings = self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * (attention + mlp + biases + 2 * hidden) + hidden + embeddings
