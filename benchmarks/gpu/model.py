"""A decoder of Llama 3.1 8B's shape with random weights, made on the device."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from engine.checkpoints.model_folder import open_model_folder
from engine.config import EngineConfig
from engine.engine import Engine
from engine.loading import LoadedModel
from engine.models.block import Layer, Mlp
from engine.models.decoder import Decoder
from engine.models.registry import decoder_spec
from engine.models.spec import DecoderSpec
from engine.quantize import forms
from engine.quantize.methods import quantize_head, quantize_weight
from engine.runner import ModelRunner
from engine.step_record import StepRecord
from kernels.ops import LinearWeight, pack_dense

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
TINY: dict[str, Any] = LLAMA_8B | {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def spec_of(config: dict[str, Any]) -> DecoderSpec:
    """The decoder that a config.json describes."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return decoder_spec(open_model_folder(folder))


def random_decoder(spec: DecoderSpec, device: torch.device, quantization: str) -> Decoder:
    """Weights of standard deviation 0.02, quantized layer by layer where that is asked for."""

    def linear(n: int, k: int, head: bool = False) -> LinearWeight:
        weight = torch.randn(n, k, device=device, dtype=torch.bfloat16).mul_(0.02)
        if quantization == "none":
            return pack_dense(weight)
        form = (quantize_head if head else quantize_weight)(weight, quantization)
        return forms.pack([form], None, torch.bfloat16)

    def norm() -> torch.Tensor:
        return torch.ones(spec.hidden_size, device=device, dtype=torch.bfloat16)

    hidden, inner, qkv = spec.hidden_size, spec.intermediate_size, sum(spec.qkv_sizes)
    layers = [
        Layer(
            norm(),
            linear(qkv, hidden),
            linear(hidden, spec.qkv_sizes[0]),
            norm(),
            Mlp(linear(2 * inner, hidden), linear(hidden, inner)),
        )
        for _ in range(spec.num_layers)
    ]
    rows = torch.randn(spec.vocab_size, hidden, device=device, dtype=torch.bfloat16).mul_(0.02)
    head = linear(spec.vocab_size, hidden, head=True)
    return Decoder(spec, pack_dense(rows), layers, norm(), head, torch.bfloat16, device)


def start_engine(
    decoder: Decoder, config: EngineConfig, max_model_len: int, records: list[StepRecord]
) -> Engine:
    """An engine on the decoder; each step's record is appended to `records`."""
    runner = ModelRunner(decoder, config, max_model_len)
    runner.warmup()
    return LoadedModel(runner, decoder.spec, None, ()).engine(config, records.append)


def read_bytes(decoder: Decoder) -> int:
    """Bytes of weights that a step reads: all but the embeddings, of which it takes a few rows."""
    head = 0 if decoder.head is decoder.embedding else decoder.embedding.nbytes
    return decoder.nbytes - head
