"""Gemma 2 and the text part of Gemma 3.

Norms around both halves of a block, weights stored as their difference from 1; embeddings scaled;
a head tied to them; windows in alternation with full attention. Gemma 2 caps scores, Gemma 3 norms
queries and keys and turns them by another base in layers with a window. Gemma Team 2024, "Gemma
2"; 2025, "Gemma 3 Technical Report".
"""

from __future__ import annotations

import dataclasses

from engine.errors import ModelError
from engine.models.config_fields import ConfigFields
from engine.models.read_config import FULL, SLIDING, layer_windows, read_decoder
from engine.models.read_rope import read_scaling
from engine.models.spec import DecoderSpec, RopeSpec
from engine.models.unknown_fields import refuse_unknown


def gemma2_spec(fields: ConfigFields) -> DecoderSpec:
    """Read a Gemma 2 config: every other layer has a window, from the first on.

    Raises:
        ModelError: a field is missing, of the wrong type, or asks for what is not supported.
    """
    spec = _gemma(
        read_decoder(
            fields,
            "Gemma2ForCausalLM",
            num_heads=8,
            num_kv_heads=4,
            head_dim=256,
            vocab_size=256000,
            max_position=8192,
            tie_word_embeddings=True,
            activation=("hidden_activation", "gelu_pytorch_tanh"),
        ),
        fields,
        period=2,
    )
    return dataclasses.replace(
        spec,
        attention_soft_cap=fields.number_or_off("attn_logit_softcapping", 50.0),
        logit_soft_cap=fields.number_or_off("final_logit_softcapping", 30.0),
    )


def gemma3_text_spec(fields: ConfigFields) -> DecoderSpec:
    """Read a Gemma 3 text config: windows but for every sixth layer, two rotary embeddings.

    Raises:
        ModelError: as `gemma2_spec`.
    """
    rope, local_rope = _ropes(fields)
    # Read above: the common reader knows one embedding for all layers.
    plain = {k: v for k, v in fields.values.items() if k not in ("rope_parameters", "rope_scaling")}
    spec = _gemma(
        read_decoder(
            ConfigFields(plain, fields.source, fields.seen),
            "Gemma3ForCausalLM",
            num_heads=8,
            num_kv_heads=4,
            head_dim=256,
            vocab_size=262208,
            max_position=131072,
            tie_word_embeddings=True,
            activation=("hidden_activation", "gelu_pytorch_tanh"),
        ),
        fields,
        period=6,
    )
    return dataclasses.replace(
        spec,
        rope=rope,
        local_rope=local_rope,
        qk_norm=True,
        logit_soft_cap=fields.number_or_off("final_logit_softcapping", 0.0),
    )


def gemma3_spec(fields: ConfigFields) -> DecoderSpec:
    """Read the text part of a Gemma 3 that also sees images, which are not served.

    Raises:
        ModelError: as `gemma2_spec`, or `text_config` is missing.
    """
    text = fields.mapping("text_config")
    if text is None:
        raise ModelError(f"{fields.source}: text_config is missing")
    inherited = {
        name: fields.values[name]
        for name in ("dtype", "torch_dtype", "tie_word_embeddings")
        if fields.has(name) and not text.has(name)
    }
    text = ConfigFields({**text.values, **inherited}, text.source)
    spec = gemma3_text_spec(text)
    refuse_unknown(text, "Gemma3ForConditionalGeneration")
    return dataclasses.replace(
        spec,
        architecture="Gemma3ForConditionalGeneration",
        text_only=True,
        roots=(
            ("language_model.model", "language_model.lm_head"),
            ("model.language_model", "lm_head"),
            ("model", "lm_head"),
        ),
    )


def _gemma(spec: DecoderSpec, fields: ConfigFields, period: int) -> DecoderSpec:
    """What both have in common; every `period`-th layer sees everything."""
    window = fields.integer_or_off("sliding_window", 4096)
    pattern = fields.integer("sliding_window_pattern", period)
    alternating = tuple((index + 1) % pattern != 0 for index in range(spec.num_layers))
    biased = fields.boolean("attention_bias", False)
    return dataclasses.replace(
        spec,
        layer_windows=layer_windows(fields, window, spec.num_layers, alternating),
        attention_scale=fields.number("query_pre_attn_scalar", 256.0) ** -0.5,
        embedding_scale=spec.hidden_size**0.5,
        qkv_bias=biased,
        output_bias=biased,
        unit_norms=True,
        output_norms=True,
    )


def _ropes(fields: ConfigFields) -> tuple[RopeSpec, RopeSpec]:
    """The rotary embeddings of layers without and with a window.

    By kind of layer in `rope_parameters`; before that `rope_theta` and `rope_scaling` were the
    former's and `rope_local_base_freq` the latter's.
    """
    head_dim = fields.integer("head_dim", 256)
    longest = fields.integer("max_position_embeddings", 131072)
    theta = fields.number("rope_theta", 1e6)
    local_theta = fields.number("rope_local_base_freq", 10000.0)
    nested = fields.mapping("rope_parameters")
    if nested is None:
        scaling = fields.mapping("rope_scaling")
        return _rope(scaling, head_dim, longest, theta), RopeSpec(theta=local_theta)
    if not set(nested.values) <= {FULL, SLIDING}:
        raise ModelError(f"{nested.source} must hold {FULL} and {SLIDING}, nothing else")
    return (
        _rope(nested.mapping(FULL), head_dim, longest, theta),
        _rope(nested.mapping(SLIDING), head_dim, longest, local_theta),
    )


def _rope(scaling: ConfigFields | None, head_dim: int, longest: int, theta: float) -> RopeSpec:
    if scaling is None:
        return RopeSpec(theta=theta)
    original = scaling.integer("original_max_position_embeddings", longest)
    return read_scaling(scaling, head_dim, longest, original, theta)
