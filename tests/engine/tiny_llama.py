"""Tiny random Llama models for tests, made and saved by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.engine.tiny_models import VOCABULARY, TinyModel

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "llama3_rope": {"rope_parameters": LLAMA3_ROPE},
    "linear_rope": {"rope_parameters": LINEAR_ROPE},
    "wide_heads": {"head_dim": 32, "num_key_value_heads": 1},
    "no_gqa": {"num_key_value_heads": 4},
}


TinyLlama = TinyModel


def make_tiny_llama(
    folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any
) -> TinyLlama:
    """A model whose weights are large enough that its outputs do not fall into loops."""
    torch.manual_seed(seed)
    defaults: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**defaults, **config})).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.normal_(1.0, 0.2)
        elif name.endswith("bias"):
            parameter.data.normal_(0.0, 0.3)
    model = model.to(dtype)
    model.save_pretrained(folder)
    return TinyLlama(folder, model)
