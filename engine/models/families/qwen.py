"""Qwen2, Qwen2.5, Qwen3 and Qwen3-MoE.

Qwen2 has biases on query, key and value; Qwen3 norms queries and keys by head instead. Windows are
off unless `use_sliding_window` is set. Yang et al. 2024, "Qwen2"; Yang et al. 2025, "Qwen3".
"""

from __future__ import annotations

import dataclasses

from engine.errors import ModelError
from engine.models.config_fields import ConfigFields
from engine.models.read_config import layer_windows, read_decoder
from engine.models.spec import DecoderSpec, ExpertsSpec


def qwen2_spec(fields: ConfigFields) -> DecoderSpec:
    """Read a Qwen2 or Qwen2.5 config.

    Raises:
        ModelError: a field is missing, of the wrong type, or asks for what is not supported.
    """
    spec = read_decoder(fields, "Qwen2ForCausalLM", num_kv_heads=32, max_position=32768)
    return dataclasses.replace(
        spec, qkv_bias=True, layer_windows=_late_windows(fields, spec.num_layers)
    )


def qwen3_spec(fields: ConfigFields) -> DecoderSpec:
    """Read a Qwen3 config.

    Raises:
        ModelError: as `qwen2_spec`.
    """
    spec = _qwen3(fields, "Qwen3ForCausalLM", num_kv_heads=32, head_dim=128)
    return dataclasses.replace(spec, layer_windows=_late_windows(fields, spec.num_layers))


def qwen3_moe_spec(fields: ConfigFields) -> DecoderSpec:
    """Read a Qwen3-MoE config; experts are in every `decoder_sparse_step`-th layer.

    But for those that `mlp_only_layers` lists. A window, if on, is that of all layers.

    Raises:
        ModelError: as `qwen2_spec`, or more experts are chosen than there are.
    """
    spec = _qwen3(fields, "Qwen3MoeForCausalLM", num_kv_heads=4, head_dim=None)
    step, plain = fields.integer("decoder_sparse_step", 1), fields.indices("mlp_only_layers")
    # Called num_experts until transformers 5.
    total = fields.integer("num_local_experts", fields.integer("num_experts", 128, most=4096))
    experts = ExpertsSpec(
        num_experts=total,
        top_k=fields.integer("num_experts_per_tok", 8, most=total),
        intermediate_size=fields.integer("moe_intermediate_size", 768),
        normalize=fields.boolean("norm_topk_prob", False),
        layers=tuple(
            index not in plain and (index + 1) % step == 0 for index in range(spec.num_layers)
        ),
    )
    return dataclasses.replace(
        spec, experts=experts, layer_windows=(_window(fields),) * spec.num_layers
    )


def _qwen3(
    fields: ConfigFields, architecture: str, num_kv_heads: int, head_dim: int | None
) -> DecoderSpec:
    biased = fields.boolean("attention_bias", False)
    spec = read_decoder(
        fields,
        architecture,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position=32768,
    )
    return dataclasses.replace(spec, qk_norm=True, qkv_bias=biased, output_bias=biased)


def _window(fields: ConfigFields) -> int:
    window = fields.integer_or_off("sliding_window", 4096)
    return window if fields.boolean("use_sliding_window", False) else 0


def _late_windows(fields: ConfigFields, num_layers: int) -> tuple[int, ...]:
    """A window from layer `max_window_layers` on, or where `layer_types` says so."""
    window = _window(fields)
    first = fields.values.get("max_window_layers", 28)
    if type(first) is not int or first < 0:
        raise ModelError(f"{fields.source}: max_window_layers must be a layer, got {first!r}")
    late = tuple(bool(window) and index >= first for index in range(num_layers))
    return layer_windows(fields, window, num_layers, late)
