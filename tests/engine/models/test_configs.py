"""Configs as they lie on the hub, old and sparse, mean what transformers makes of them."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from engine.errors import ModelError
from engine.models.registry import ARCHITECTURES, spec_of
from engine.models.spec import DecoderSpec

PHI_FACTORS = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
# Fields as published (values shortened where they do not matter), without those left to defaults.
HUB: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama-2": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "max_position_embeddings": 4096,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "torch_dtype": "float16",
            "vocab_size": 32000,
        },
    ),
    "llama-3.2-1b": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {
            "attention_bias": False,
            "head_dim": 64,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "vocab_size": 128256,
        },
    ),
    "mistral-0.1": (
        "MistralForCausalLM",
        "MistralConfig",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "vocab_size": 32000,
        },
    ),
    "mistral-sparse": (
        "MistralForCausalLM",
        "MistralConfig",
        {
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 16,
            "vocab_size": 100,
        },
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "router_aux_loss_coef": 0.02,
            "sliding_window": None,
            "vocab_size": 32000,
        },
    ),
    "qwen2.5-yarn": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "max_position_embeddings": 32768,
            "max_window_layers": 28,
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "rope_scaling": {
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
                "type": "yarn",
            },
            "rope_theta": 1000000.0,
            "sliding_window": 131072,
            "use_sliding_window": False,
            "vocab_size": 152064,
        },
    ),
    "qwen3": (
        "Qwen3ForCausalLM",
        "Qwen3Config",
        {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "max_position_embeddings": 40960,
            "max_window_layers": 10,
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "rope_theta": 1000000,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "vocab_size": 151936,
        },
    ),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {
            "decoder_sparse_step": 1,
            "head_dim": 128,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "max_position_embeddings": 40960,
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
    ),
    "phi-3-mini-128k": (
        "Phi3ForCausalLM",
        "Phi3Config",
        {
            "attention_bias": False,
            "embd_pdrop": 0.0,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "original_max_position_embeddings": 4096,
            "rope_scaling": {**PHI_FACTORS, "type": "longrope"},
            "rope_theta": 10000.0,
            "sliding_window": 262144,
            "vocab_size": 32064,
        },
    ),
    "phi-4": (
        "Phi3ForCausalLM",
        "Phi3Config",
        {
            "hidden_size": 5120,
            "intermediate_size": 17920,
            "max_position_embeddings": 16384,
            "num_attention_heads": 40,
            "num_hidden_layers": 40,
            "num_key_value_heads": 10,
            "original_max_position_embeddings": 16384,
            "rope_scaling": None,
            "rope_theta": 250000,
            "sliding_window": None,
            "vocab_size": 100352,
        },
    ),
    "gemma-2-2b": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "query_pre_attn_scalar": 256,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
        },
    ),
    "gemma-3-1b": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "head_dim": 256,
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "num_attention_heads": 4,
            "num_hidden_layers": 26,
            "num_key_value_heads": 1,
            "query_pre_attn_scalar": 256,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "vocab_size": 262144,
        },
    ),
    "gemma-3-4b": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "mm_tokens_per_image": 256,
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            "torch_dtype": "bfloat16",
        },
    ),
}


def published(name: str) -> DecoderSpec:
    architecture, _, fields = HUB[name]
    return spec_of(architecture, fields, "config.json")


@pytest.mark.parametrize("name", list(HUB))
def test_absent_fields_mean_what_they_mean_in_transformers(name: str) -> None:
    """transformers reads the config, spells every field out in today's way, and so it is the same.

    YaRN's length apart, which transformers does not bound.
    """
    architecture, config_class, fields = HUB[name]
    spelled = getattr(transformers, config_class)(**fields).to_dict()
    spec = spec_of(architecture, spelled, "config.json")
    assert spec == published(name)


def test_windows_of_published_models() -> None:
    assert set(published("mistral-0.1").layer_windows) == {4096}
    assert set(published("qwen2.5-yarn").layer_windows) == {0}
    assert published("qwen3").layer_windows == (0,) * 10 + (4096,) * 18
    assert published("gemma-2-2b").layer_windows == (4096, 0) * 13
    assert published("gemma-3-4b").layer_windows[:7] == (1024,) * 5 + (0, 1024)


def test_ropes_of_gemma_3() -> None:
    spec = published("gemma-3-4b")
    assert spec.local_rope is not None
    assert (spec.rope.theta, spec.rope.kind, spec.rope.factor) == (1e6, "linear", 8.0)
    assert (spec.local_rope.theta, spec.local_rope.kind) == (10000.0, "default")


TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("LlamaForCausalLM", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 chan"),
        ("LlamaForCausalLM", {"sliding_window": 4096}, "sliding_window=4096 changes the model"),
        ("LlamaForCausalLM", {"num_local_experts": 8}, "num_local_experts=8 changes the model"),
        ("LlamaForCausalLM", {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
        ("LlamaForCausalLM", {"layer_types": ["chunked_attention"] * 2}, "layer_types="),
        ("LlamaForCausalLM", {"layer_types": 3}, "layer_types=3 changes"),
        ("LlamaForCausalLM", {"num_hidden_layers": 10**9}, "num_hidden_layers must be at most"),
        ("MistralForCausalLM", {"attention_bias": True}, "attention_bias=True changes"),
        ("MistralForCausalLM", {"sliding_window": 0}, "sliding_window must be a positive integer"),
        ("MixtralForCausalLM", {"num_experts_per_tok": 9}, "num_experts_per_tok must be at most 8"),
        ("Qwen2ForCausalLM", {"max_window_layers": -1}, "max_window_layers must be a layer"),
        (
            "Qwen2ForCausalLM",
            {"layer_types": ["sliding_attention"] * 2},
            "layer_types names sliding_attention but",
        ),
        (
            "Qwen3ForCausalLM",
            {"layer_types": ["linear_attention"] * 2},
            "holds 'linear_attention', which is not supported",
        ),
        ("Qwen3ForCausalLM", {"layer_types": ["full_attention"]}, "must be a list of 2 texts"),
        ("Qwen3MoeForCausalLM", {"mlp_only_layers": "0"}, "mlp_only_layers must be a list of ind"),
        ("Qwen3MoeForCausalLM", {"shared_expert_intermediate_size": 64}, "shared_expert_inter"),
        ("Qwen3MoeForCausalLM", {"norm_topk_prob": 1}, "norm_topk_prob must be true or false"),
        ("Phi3ForCausalLM", {"hidden_act": "relu2"}, "hidden_act 'relu2' is not supported"),
        ("Gemma2ForCausalLM", {"final_logit_softcapping": "30"}, "final_logit_softcapping must be"),
        ("Gemma2ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("Gemma2ForCausalLM", {"hidden_activation": "gelu"}, "hidden_activation 'gelu' is not"),
        ("Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 chan"),
        ("Gemma3ForCausalLM", {"rope_parameters": {"rope_type": "default"}}, "must hold full_att"),
        ("Gemma3ForConditionalGeneration", {}, "text_config is missing"),
        (
            "Gemma3ForConditionalGeneration",
            {"text_config": {**TINY, "use_bidirectional_attention": True}},
            "config.json: text_config: use_bidirectional_attention=True changes",
        ),
    ],
)
def test_what_is_not_served_is_refused(
    architecture: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message) as error:
        spec_of(architecture, {**TINY, **fields}, "config.json")
    assert str(error.value).startswith("config.json")
    assert str(error.value).count(". ") == 0


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if "Conditional" not in a])
def test_fields_that_change_nothing_are_let_through(architecture: str) -> None:
    extra = {
        "attention_dropout": 0.1,
        "layer_types": ["full_attention"] * 2,
        "logit_scale": 1.0,
        "unsloth_fixed": True,
        "use_bidirectional_attention": False,
        "clip_qkv": None,
    }
    changed = spec_of(architecture, {**TINY, **extra}, "config.json")
    assert changed.num_layers == 2
