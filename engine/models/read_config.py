"""What the configs of all families have in common, read once."""

from __future__ import annotations

from engine.errors import ModelError
from engine.models.config_fields import ConfigFields
from engine.models.read_rope import read_rope
from engine.models.spec import Activation, DecoderSpec

# A bound for what is made per layer before any tensor is looked for.
MOST_LAYERS = 4096
FULL, SLIDING = "full_attention", "sliding_attention"
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def read_decoder(
    fields: ConfigFields,
    architecture: str,
    *,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    vocab_size: int | None = None,
    max_position: int = 2048,
    rms_norm_eps: float = 1e-6,
    tie_word_embeddings: bool = False,
    rope_theta: float = 10000.0,
    partial_rotary: bool = False,
    activation: tuple[str, str] = ("hidden_act", "silu"),
) -> DecoderSpec:
    """The decoder of a plain Llama; a family changes what it does otherwise.

    The keywords are what the family's fields stand for where they are absent; None for required,
    or for what follows from other fields (as many key/value heads as heads; hidden_size / heads).
    `partial_rotary` says that the family has `partial_rotary_factor`; `activation` is the field
    that names the gate's activation, and which it is by default.

    Raises:
        ModelError: a field is missing, of the wrong type, or asks for what is not supported.
    """
    hidden_size = fields.integer("hidden_size")
    heads = _integer(fields, "num_attention_heads", num_heads)
    kv_heads = fields.integer_or_off("num_key_value_heads", num_kv_heads or heads) or heads
    if heads % kv_heads:
        raise ModelError(
            f"{fields.source}: num_attention_heads={heads} must be a multiple of "
            f"num_key_value_heads={kv_heads}"
        )
    dim = fields.integer("head_dim", head_dim or max(hidden_size // heads, 1))
    if dim % 2:
        raise ModelError(f"{fields.source}: head_dim={dim} must be even")
    num_layers = fields.integer("num_hidden_layers", most=MOST_LAYERS)
    longest = fields.integer("max_position_embeddings", max_position)
    rope, longest = read_rope(fields, dim, longest, rope_theta)
    if rope.fraction != 1 and not partial_rotary:
        raise ModelError(
            f"{fields.source}: partial_rotary_factor must be 1 for {architecture}, "
            f"got {rope.fraction}"
        )
    return DecoderSpec(
        architecture=architecture,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        vocab_size=_integer(fields, "vocab_size", vocab_size),
        max_position=longest,
        rms_norm_eps=fields.number("rms_norm_eps", rms_norm_eps),
        rope=rope,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", tie_word_embeddings),
        checkpoint_dtype=checkpoint_dtype(fields),
        layer_windows=(0,) * num_layers,
        activation=_activation(fields, *activation),
    )


def layer_windows(
    fields: ConfigFields, window: int, num_layers: int, default: tuple[bool, ...]
) -> tuple[int, ...]:
    """The window of each layer: `window` where `layer_types` says sliding, 0 where it says full.

    Without `layer_types`, `default` says which layers slide.

    Raises:
        ModelError: `layer_types` has another length or another kind of attention.
    """
    kinds = fields.texts("layer_types", num_layers, (FULL, SLIDING))
    slides = default if kinds is None else tuple(kind == SLIDING for kind in kinds)
    if any(slides) and not window:
        raise ModelError(f"{fields.source}: layer_types names {SLIDING} but sliding_window is null")
    return tuple(window if slide else 0 for slide in slides)


def checkpoint_dtype(fields: ConfigFields) -> str:
    """dtype of the checkpoint: `dtype`, or `torch_dtype` as it was called; float32 if unsaid.

    Raises:
        ModelError: another dtype than float32, bfloat16 and float16.
    """
    dtype = fields.text("dtype", fields.text("torch_dtype", "float32"))
    dtype = dtype.removeprefix("torch.")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ModelError(
            f"{fields.source}: dtype {dtype!r} is not supported; float32, bfloat16 and float16 are"
        )
    return dtype


def _integer(fields: ConfigFields, name: str, default: int | None) -> int:
    return fields.integer(name) if default is None else fields.integer(name, default)


def _activation(fields: ConfigFields, name: str, default: str) -> Activation:
    value = fields.text(name, default)
    if value not in _ACTIVATIONS:
        raise ModelError(
            f"{fields.source}: {name} {value!r} is not supported; {', '.join(_ACTIVATIONS)} are"
        )
    return _ACTIVATIONS[value]
