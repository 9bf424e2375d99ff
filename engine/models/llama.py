"""The Llama family: `LlamaForCausalLM`, and `MistralForCausalLM`, which has the same tensors."""

from __future__ import annotations

import dataclasses

from engine.errors import ModelError
from engine.models.config_fields import ConfigFields
from engine.models.spec import DecoderSpec, RopeSpec

# A bound for what is made per layer before any tensor is looked for.
MOST_LAYERS = 4096
ROPE_KINDS = ("default", "linear", "llama3")


def llama_spec(fields: ConfigFields) -> DecoderSpec:
    """Read a Llama config.

    Raises:
        ModelError: a field is missing, of the wrong type, or asks for what is not supported.
    """
    hidden_size = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(
            f"{fields.source}: num_attention_heads={num_heads} must be a multiple of "
            f"num_key_value_heads={num_kv_heads}"
        )
    head_dim = fields.integer("head_dim", max(hidden_size // num_heads, 1))
    if head_dim % 2:
        raise ModelError(f"{fields.source}: head_dim={head_dim} must be even")
    activation = fields.text("hidden_act", "silu")
    if activation != "silu":
        raise ModelError(f"{fields.source}: hidden_act {activation!r} is not supported, silu is")
    max_position = fields.integer("max_position_embeddings", 2048)
    num_layers = fields.integer("num_hidden_layers", most=MOST_LAYERS)
    return DecoderSpec(
        architecture="LlamaForCausalLM",
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=fields.integer("vocab_size"),
        max_position=max_position,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=rope_spec(fields, max_position),
        attention_bias=fields.boolean("attention_bias", False),
        mlp_bias=fields.boolean("mlp_bias", False),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        checkpoint_dtype=checkpoint_dtype(fields),
        layer_windows=(0,) * num_layers,
    )


def mistral_spec(fields: ConfigFields) -> DecoderSpec:
    """Read a Mistral config: Llama without biases, with a window that all layers share.

    Without `sliding_window` it is 4096 tokens, as in transformers; null turns it off.

    Raises:
        ModelError: as `llama_spec`.
    """
    spec = llama_spec(fields)
    window = 0
    if fields.values.get("sliding_window", 4096) is not None:
        window = fields.integer("sliding_window", 4096)
    return dataclasses.replace(
        spec,
        architecture="MistralForCausalLM",
        attention_bias=False,
        mlp_bias=False,
        layer_windows=(window,) * spec.num_layers,
    )


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


def rope_spec(fields: ConfigFields, max_position: int) -> RopeSpec:
    """Read the rotary embedding in both spellings.

    transformers 5 writes everything into `rope_parameters`; before, `rope_theta` stood beside
    `rope_scaling`, whose kind was first called `type` and then `rope_type`.

    Raises:
        ModelError: a kind of scaling that is not supported, or a bad field.
    """
    theta = fields.number("rope_theta", 10000.0)
    scaling = fields.mapping("rope_parameters") or fields.mapping("rope_scaling")
    if scaling is None:
        return RopeSpec(theta=theta)
    theta = scaling.number("rope_theta", theta)
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    if kind not in ROPE_KINDS:
        raise ModelError(
            f"{scaling.source}: rope_type {kind!r} is not supported; {', '.join(ROPE_KINDS)} are"
        )
    if scaling.number("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(f"{scaling.source}: partial_rotary_factor must be 1")
    if kind == "default":
        return RopeSpec(theta=theta)
    factor = scaling.number("factor")
    if kind == "linear":
        return RopeSpec(theta=theta, kind=kind, factor=factor)
    rope = RopeSpec(
        theta=theta,
        kind=kind,
        factor=factor,
        low_freq_factor=scaling.number("low_freq_factor"),
        high_freq_factor=scaling.number("high_freq_factor"),
        original_max_position=scaling.integer("original_max_position_embeddings", max_position),
    )
    if rope.low_freq_factor >= rope.high_freq_factor:
        raise ModelError(f"{scaling.source}: low_freq_factor must be below high_freq_factor")
    return rope
