"""What the configs of model families leave unsaid: names, defaults, and the make of their layers.

Configs leave out what equals their family's default, so the defaults that matter stand here; they
are those of the families' own configuration classes in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Other names that old families have for the same things.
ALIASES = {
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "num_key_value_heads": ("num_kv_heads", "multi_query_group_num"),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size"),
    "max_position_embeddings": ("n_positions", "max_sequence_length", "max_seq_len", "seq_length"),
    "num_experts": ("n_routed_experts", "num_local_experts", "moe_num_experts"),
    "num_experts_per_tok": (
        "experts_per_token",
        "num_experts_per_token",
        "moe_topk",
        "moe_top_k",
        "moe_k",
    ),
    "moe_intermediate_size": ("expert_intermediate_size",),
    "n_shared_experts": ("num_shared_experts", "moe_num_shared_experts"),
    "shared_expert_intermediate_size": ("shared_intermediate_size",),
}
_GEMMA: dict[str, Any] = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
}
_GEMMA3 = {**_GEMMA, "vocab_size": 262208, "max_position_embeddings": 131072}
_DEEPSEEK: dict[str, Any] = {"moe_intermediate_size": 1407, "max_position_embeddings": 2048}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072},
    "mixtral": {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    "qwen2_moe": {
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    },
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
    "qwen3_moe": {
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "max_position_embeddings": 32768,
    },
    "phi3": {"max_position_embeddings": 4096},
    "gemma": {**_GEMMA, "num_attention_heads": 16, "num_key_value_heads": 16},
    "gemma2": {**_GEMMA, "vocab_size": 256000, "max_position_embeddings": 8192},
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "cohere": {"tie_word_embeddings": True},
    "cohere2": {"tie_word_embeddings": True},
    "gpt_oss": {
        "head_dim": 64,
        "num_key_value_heads": 8,
        "num_experts": 128,
        "num_experts_per_tok": 4,
        "attention_bias": True,
    },
    "llama4_text": {
        "head_dim": 128,
        "num_key_value_heads": 8,
        "num_experts": 16,
        "num_experts_per_tok": 1,
        "n_shared_experts": 1,
    },
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": {**_DEEPSEEK, "moe_intermediate_size": 2048},
    "gpt2": {"tie_word_embeddings": True, "vocab_size": 50257},
    "gpt_bigcode": {"tie_word_embeddings": True},
    "bloom": {"tie_word_embeddings": True},
    "falcon": {"tie_word_embeddings": True},
    "opt": {"tie_word_embeddings": True},
    "mpt": {"tie_word_embeddings": True},
    "starcoder2": {"tie_word_embeddings": True},
}
MODEL_TYPES = {  # of configs that name an architecture alone
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Phi3ForCausalLM": "phi3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "Gemma3ForConditionalGeneration": "gemma3",
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "GptOssForCausalLM": "gpt_oss",
}
# Two matrices in the MLP, and biases wherever there can be one.
UNGATED = {
    "bloom",
    "falcon",
    "gpt2",
    "gpt_bigcode",
    "gpt_neox",
    "gptj",
    "mpt",
    "nemotron",
    "opt",
    "phi",
    "starcoder2",
}
BIASED = {"bloom", "gpt2", "gpt_bigcode", "gpt_neox", "opt", "phi", "starcoder2"}
LEARNED_POSITIONS = {"gpt2", "gpt_bigcode", "opt"}
QKV_BIASED = {"qwen2", "qwen2_moe", "qwen2_vl", "qwen2_5_vl"}
NORMED_HEADS = {"qwen3", "qwen3_moe", "gemma3", "gemma3_text"}
FOUR_NORMS = {"gemma2", "gemma3", "gemma3_text", "glm4"}
