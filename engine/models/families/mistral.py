"""Mistral and Mixtral: Llama without biases, with one window for all layers; Mixtral has experts.

Jiang et al. 2023, "Mistral 7B"; Jiang et al. 2024, "Mixtral of Experts".
"""

from __future__ import annotations

import dataclasses

from engine.models.config_fields import ConfigFields
from engine.models.read_config import read_decoder
from engine.models.spec import DecoderSpec, ExpertsSpec


def mistral_spec(fields: ConfigFields) -> DecoderSpec:
    """Read a Mistral config; without `sliding_window` its window is 4096 tokens, null is none.

    Raises:
        ModelError: a field is missing, of the wrong type, or asks for what is not supported.
    """
    spec = read_decoder(fields, "MistralForCausalLM", num_kv_heads=8, max_position=131072)
    window = fields.integer_or_off("sliding_window", 4096)
    return dataclasses.replace(spec, layer_windows=(window,) * spec.num_layers)


def mixtral_spec(fields: ConfigFields) -> DecoderSpec:
    """Read a Mixtral config: every layer has experts, and no window unless `sliding_window` is set.

    Raises:
        ModelError: as `mistral_spec`, or more experts are chosen than there are.
    """
    spec = read_decoder(
        fields,
        "MixtralForCausalLM",
        num_kv_heads=8,
        max_position=131072,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
    )
    window = fields.integer("sliding_window", 0) if fields.has("sliding_window") else 0
    experts = ExpertsSpec(
        num_experts=(total := fields.integer("num_local_experts", 8, most=4096)),
        top_k=fields.integer("num_experts_per_tok", 2, most=total),
        intermediate_size=spec.intermediate_size,
        normalize=True,
        layers=(True,) * spec.num_layers,
        block="block_sparse_moe",
        parts=("w1", "w3", "w2"),
    )
    return dataclasses.replace(spec, layer_windows=(window,) * spec.num_layers, experts=experts)
