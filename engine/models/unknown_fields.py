"""Fields that would change the mathematics of a model whose family does not have them.

Configs carry many fields that say nothing about the forward pass, and new ones every month, so a
field that nobody knows is let through. Those below are known: in some architecture they change
what is computed. Where a family does not read one, only its neutral values are accepted.
"""

from __future__ import annotations

from typing import Any

from engine.errors import ModelError
from engine.models.config_fields import ConfigFields

_NEVER: tuple[Any, ...] = ()
_OFF: tuple[Any, ...] = (False, 0)
_ONE: tuple[Any, ...] = (1,)

# name -> values that change nothing (null always does not)
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "alibi": _OFF,
    "attention_bias": _OFF,
    "attention_chunk_size": _OFF,
    "attention_multiplier": _NEVER,
    "attn_logit_softcapping": _OFF,
    "attn_output_gate": _OFF,
    "attn_temperature_tuning": _OFF,
    "clip_qkv": _NEVER,
    "embedding_multiplier": _ONE,
    "final_logit_softcapping": _OFF,
    "kv_lora_rank": _NEVER,
    "layer_types": _NEVER,
    "lm_head_bias": _OFF,
    "logit_scale": _ONE,
    "logits_scaling": _ONE,
    "mlp_bias": _OFF,
    "mlp_only_layers": ([],),
    "moe_intermediate_size": _OFF,
    "n_routed_experts": _OFF,
    "n_shared_experts": _OFF,
    "no_rope_layers": ([],),
    "num_experts": _OFF,
    "num_kv_shared_layers": _OFF,
    "num_local_experts": _OFF,
    "num_shared_experts": _OFF,
    "original_max_position_embeddings": _NEVER,
    "partial_rotary_factor": _ONE,
    "q_lora_rank": _NEVER,
    "qk_layernorm": _OFF,
    "query_pre_attn_scalar": _NEVER,
    "residual_multiplier": _ONE,
    "rope_local_base_freq": _NEVER,
    "rotary_pct": _ONE,
    "scale_depth": _NEVER,
    "scale_emb": _ONE,
    "shared_expert_intermediate_size": _OFF,
    "sliding_window": _OFF,
    "sliding_window_pattern": _NEVER,
    "use_alibi": _OFF,
    "use_bidirectional_attention": _OFF,
    "use_parallel_residual": _OFF,
    "use_qk_norm": _OFF,
    "use_sliding_window": _OFF,
}


def refuse_unknown(fields: ConfigFields, architecture: str) -> None:
    """Refuse what the family did not read and what would change the model.

    Raises:
        ModelError: such a field has a value other than its neutral ones.
    """
    for name, neutral in NEUTRAL.items():
        if name in fields.seen or not fields.has(name):
            continue
        value = fields.values[name]
        if value not in neutral and not _is_full_everywhere(name, value):
            raise ModelError(
                f"{fields.source}: {name}={value!r} changes the model in a way that "
                f"{architecture} does not have here; only a model without it is supported"
            )


def _is_full_everywhere(name: str, value: Any) -> bool:
    if name != "layer_types" or not isinstance(value, list):
        return False
    return all(kind == "full_attention" for kind in value)
