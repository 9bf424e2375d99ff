"""Tiny random models of every family, made and saved by transformers.

`CASES` names variations of families; `make_tiny(case, folder)` makes one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from engine import LLM
from engine.checkpoints.model_folder import open_model_folder
from engine.checkpoints.open_source import open_source
from engine.models.decoder import Decoder
from engine.models.load_decoder import load_decoder
from engine.models.registry import decoder_spec
from kernels.layer_cache import LayerCache
from kernels.metadata import build_attention_metadata

VOCABULARY = 128
BLOCK = 8
SIZES: dict[str, Any] = {
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
    "pad_token_id": None,
}
FULL, SLIDING = "full_attention", "sliding_attention"
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.5, 4.0, 9.0],
    "partial_rotary_factor": 0.5,
}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
GEMMA2 = {
    "head_dim": 24,
    "query_pre_attn_scalar": 20,
    "sliding_window": 9,
    "attn_logit_softcapping": 4.0,
    "final_logit_softcapping": 6.0,
}
GEMMA3 = {
    "head_dim": 24,
    "query_pre_attn_scalar": 20,
    "sliding_window": 9,
    "layer_types": [SLIDING, FULL, SLIDING],
    "rope_parameters": {
        FULL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 50000.0},
        SLIDING: {"rope_type": "default", "rope_theta": 1000.0},
    },
}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
# name -> (family as transformers names its classes, config)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_yarn": ("Llama", {"rope_parameters": YARN}),
    "llama_yarn_mscale": (
        "Llama",
        {
            "rope_parameters": YARN
            | {"mscale": 1.2, "mscale_all_dim": 0.7, "beta_fast": 8.0, "truncate": False}
        },
    ),
    "llama_dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 24}),
    "mistral_window": ("Mistral", {"sliding_window": 9}),
    "qwen2": ("Qwen2", {}),
    "qwen2_tied_yarn": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen2_window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
    "qwen3_window": (
        "Qwen3",
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": [SLIDING, FULL, SLIDING],
        },
    ),
    "phi3": ("Phi3", {"sliding_window": 9}),
    "phi3_tied": ("Phi3", {"tie_word_embeddings": True, "partial_rotary_factor": 0.75}),
    "phi3_longrope": (
        "Phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
    ),
    "gemma2": ("Gemma2", GEMMA2),
    "gemma2_uncapped": (
        "Gemma2",
        {
            **GEMMA2,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "tie_word_embeddings": False,
            "attention_bias": True,
        },
    ),
    "gemma3": ("Gemma3", GEMMA3),
    "gemma3_images": ("Gemma3ForConditionalGeneration", {"text_config": {**SIZES, **GEMMA3}}),
    "mixtral": ("Mixtral", {"num_local_experts": 5}),
    "mixtral_window": ("Mixtral", {"num_local_experts": 3, "sliding_window": 9}),
    "qwen3_moe": ("Qwen3Moe", {**MOE, "norm_topk_prob": True}),
    "qwen3_moe_sparse": (
        "Qwen3Moe",
        {
            **MOE,
            "num_experts_per_tok": 3,
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "use_sliding_window": True,
            "sliding_window": 9,
        },
    ),
}


@dataclass(frozen=True)
class TinyModel:
    """A model that transformers has saved in `folder`."""

    folder: Path
    model: Any

    def greedy(self, prompt: list[int], max_tokens: int) -> list[int]:
        """What transformers generates greedily."""
        out = self.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        return out[0, len(prompt) :].tolist()

    def llm(self, **knobs: Any) -> LLM:
        """The engine on this model, single-threaded unless asked otherwise."""
        return LLM(
            str(self.folder), **{"device": "cpu", "max_model_len": 96, "num_threads": 1, **knobs}
        )

    def certain(self, prompt: list[int], output: list[int], gap: float = 1e-3) -> int:
        """How many tokens of `output` no rounding can change.

        A token whose lead over the second in transformers' own logits is below `gap` is a tie that
        float32 rounding may decide either way, and what follows it with it.
        """
        top = self.logits(prompt + output)[len(prompt) - 1 : -1].topk(2).values
        close = (top[:, 0] - top[:, 1] < gap).nonzero()
        return int(close[0]) if len(close) else len(output)

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """float32 [len(tokens), vocabulary]."""
        with torch.inference_mode():
            return self.model(torch.tensor([tokens])).logits[0].float()

    def decoder(
        self,
        dtype: torch.dtype = torch.float32,
        quantization: str = "none",
        max_position: int = 96,
    ) -> Decoder:
        """The engine's decoder of this folder, without an engine around it."""
        folder = open_model_folder(self.folder)
        decoder = load_decoder(
            open_source(folder), decoder_spec(folder), dtype, torch.device("cpu"), quantization
        )
        decoder.set_max_position(max_position)
        return decoder


def paged_logits(decoder: Decoder, tokens: list[int], chunks: list[int]) -> torch.Tensor:
    """Logits of every position, float32, computed in chunks through pages that lie out of order."""
    spec = decoder.spec
    pages = -(-len(tokens) // BLOCK)
    table = list(range(pages))[::-1]
    shape = (pages, spec.num_kv_heads, BLOCK, spec.head_dim)
    caches = [LayerCache.allocate(shape, decoder.dtype) for _ in range(spec.num_layers)]
    parts, start = [], 0
    with torch.inference_mode():
        for chunk in chunks:
            end = start + chunk
            metadata = build_attention_metadata([table], [chunk], [end], BLOCK)
            hidden = decoder.forward(
                torch.tensor(tokens[start:end]),
                torch.arange(start, end),
                caches,
                [metadata] * spec.num_layers,
            )
            parts.append(decoder.logits(hidden))
            start = end
    return torch.cat(parts).float()


def make_tiny(
    case: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any
) -> TinyModel:
    """The model of a case, with `config` changed; weights are large enough not to repeat itself."""
    family, fields = CASES[case]
    if family == "Gemma3ForConditionalGeneration":
        settings = transformers.Gemma3Config(**{**fields, **config}, vision_config=VISION)
        model_class: Any = transformers.Gemma3ForConditionalGeneration
    else:
        prefix = "Gemma3Text" if family == "Gemma3" else family
        settings = getattr(transformers, f"{prefix}Config")(**{**SIZES, **fields, **config})
        model_class = getattr(transformers, f"{family}ForCausalLM")
    settings._attn_implementation = "eager"  # the only one that caps scores
    torch.manual_seed(seed)
    model = model_class(settings).eval()
    fill(model)
    model = model.to(dtype)
    model.save_pretrained(folder)
    return TinyModel(folder, model)


def fill(model: torch.nn.Module) -> None:
    """Random weights in which every part of the model is felt."""
    is_gemma = "Gemma" in type(model).__name__
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.normal_(0.0 if is_gemma else 1.0, 0.2)
        elif name.endswith("bias"):
            parameter.data.normal_(0.0, 0.3)
        elif name.endswith("gate.weight"):
            parameter.data.normal_(0.0, 0.5)
        elif parameter.dim() > 1:
            parameter.data.normal_(0.0, 0.3 if parameter.shape[-1] < 128 else 0.2)
