"""Llama 1 to 3.x and what shares their architecture: the plain decoder, with optional biases.

Touvron et al. 2023, "LLaMA"; Grattafiori et al. 2024, "The Llama 3 Herd of Models".
"""

from __future__ import annotations

import dataclasses

from engine.models.config_fields import ConfigFields
from engine.models.read_config import read_decoder
from engine.models.spec import DecoderSpec


def llama_spec(fields: ConfigFields) -> DecoderSpec:
    """Read a Llama config.

    Raises:
        ModelError: a field is missing, of the wrong type, or asks for what is not supported.
    """
    biased = fields.boolean("attention_bias", False)
    return dataclasses.replace(
        read_decoder(fields, "LlamaForCausalLM"),
        qkv_bias=biased,
        output_bias=biased,
        mlp_bias=fields.boolean("mlp_bias", False),
    )
