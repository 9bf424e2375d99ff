"""Phi-3, Phi-3.5 and Phi-4 (mini and 14B): fused projections, LongRoPE, partly rotated heads.

Abdin et al. 2024, "Phi-3 Technical Report"; the mixture of experts (PhiMoE), Phi-3-small and the
multimodal models are other architectures.
"""

from __future__ import annotations

import dataclasses

from engine.models.config_fields import ConfigFields
from engine.models.read_config import read_decoder
from engine.models.spec import DecoderSpec

_ORIGINAL = "original_max_position_embeddings"


def phi3_spec(fields: ConfigFields) -> DecoderSpec:
    """Read a Phi-3 config; its first files call LongRoPE "su" or "yarn".

    Raises:
        ModelError: a field is missing, of the wrong type, or asks for what is not supported.
    """
    values = {_ORIGINAL: 4096, **fields.values}
    for name in ("rope_parameters", "rope_scaling"):
        scaling = values.get(name)
        if isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type")) == "yarn":
            values[name] = {**scaling, "rope_type": "longrope"}
    fields = ConfigFields(values, fields.source, fields.seen)
    spec = read_decoder(
        fields, "Phi3ForCausalLM", max_position=4096, rms_norm_eps=1e-5, partial_rotary=True
    )
    window = fields.integer("sliding_window") if fields.has("sliding_window") else 0
    fields.seen.add("sliding_window")
    return dataclasses.replace(spec, fused_tensors=True, layer_windows=(window,) * spec.num_layers)
