"""Whole tiny models from quantized folders: the engine's logits against those of the float model
of the dequantized weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from engine.checkpoints.model_folder import open_model_folder
from engine.checkpoints.source import TensorSource
from engine.config import EngineConfig
from engine.errors import ConfigError, ModelError
from engine.loading import load_model
from engine.models.decoder import Decoder
from engine.models.load_decoder import load_decoder
from engine.models.registry import decoder_spec
from engine.quantize.forms import DenseForm, LinearForm, dequantize
from kernels.ops import DenseWeight
from tests.engine.checkpoints.gptq_packer import awq_layer, gptq_layer, pack_rows
from tests.engine.checkpoints.quantized_files import edit, quantize_model, source_of
from tests.engine.tiny_llama import TinyLlama, make_tiny_llama
from tests.engine.tiny_models import paged_logits

TOKENS = [3, 99, 17, 42, 8, 120, 64, 5, 77, 31]
GROUP = 32
Quantizer = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]


def grouped(weight: Tensor, bits: int, g_idx: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric integers of a weight: q [N, K], zeros and scales [N, groups]."""
    groups = int(g_idx.max()) + 1
    low = torch.stack([weight[:, g_idx == g].amin(1) for g in range(groups)], 1).clamp(max=0)
    high = torch.stack([weight[:, g_idx == g].amax(1) for g in range(groups)], 1).clamp(min=0)
    top = (1 << bits) - 1
    scales = ((high - low) / top).half()
    zeros = (-low / scales.float()).round().clamp(0, top)
    q = (weight / scales.float()[:, g_idx] + zeros[:, g_idx]).round().clamp(0, top)
    return q.long(), zeros.long(), scales


def gptq(bits: int, shuffled: bool = False) -> Quantizer:
    def quantize(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        g_idx = torch.arange(weight.shape[1]) // GROUP
        if shuffled:
            # Each linear has an order of its own, so fused ones cannot be stacked.
            generator = torch.Generator().manual_seed(int(weight.abs().sum() * 100))
            g_idx = g_idx[torch.randperm(len(g_idx), generator=generator)]
        return gptq_layer(*grouped(weight, bits, g_idx), bits, g_idx)

    return quantize


def awq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    g_idx = torch.arange(weight.shape[1]) // GROUP
    return awq_layer(*grouped(weight, 4, g_idx), GROUP)


def packed(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scales = weight.view(weight.shape[0], -1, GROUP).abs().amax(2) / 7
    spread = scales.repeat_interleave(GROUP, 1)
    q = (weight / spread).round().clamp(-8, 7)
    stored = {
        "weight_packed": pack_rows((q + 8).long(), 4),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    return stored, q * spread


def fp8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scales = weight.view(-1, 32, weight.shape[1] // 32, 32).abs().amax((1, 3)) / 448
    spread = scales.repeat_interleave(32, 0).repeat_interleave(32, 1)
    data = (weight / spread).to(torch.float8_e4m3fn)
    return {"weight": data, "weight_scale_inv": scales}, data.float() * spread


def int8_channel(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scales = weight.abs().amax(1, keepdim=True) / 127
    q = (weight / scales).round()
    return {"weight": q.to(torch.int8), "weight_scale": scales}, q * scales


def llm_int8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    peaks = weight.abs().amax(1)
    q = (weight / peaks[:, None] * 127).round()
    return {"weight": q.to(torch.int8), "SCB": peaks}, q * peaks[:, None] / 127


def nf4(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    data, state = bnb.quantize_4bit(weight, blocksize=32, quant_type="nf4")
    stored = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    return {"weight": data, **stored}, bnb.dequantize_4bit(data, state)


def compressed(weights: dict[str, Any], fmt: str, activations: Any = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": fmt,
        "config_groups": {"group_0": group},
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
    }


DYNAMIC = {"num_bits": 8, "dynamic": True, "strategy": "token"}
GPTQ = {"quant_method": "gptq", "group_size": GROUP, "sym": False}
INT4_GROUP = {"num_bits": 4, "strategy": "group", "group_size": GROUP}
# Root mean square, of the spread of the logits: float32 sums in another order, and what kernels
# round activations to (bfloat16, int8 or e4m3), through three layers of large random weights.
EXACT, BFLOAT16, INT8, E4M3 = 1e-5, 0.05, 0.15, 0.4
# How weights are quantized, what the config says, and the tolerance of the kernels.
CASES: dict[str, tuple[Quantizer, dict[str, Any], float]] = {
    "gptq 4": (gptq(4), {**GPTQ, "bits": 4}, BFLOAT16),
    "gptq 4 desc_act": (gptq(4, shuffled=True), {**GPTQ, "bits": 4, "desc_act": True}, BFLOAT16),
    "gptq 3": (gptq(3), {**GPTQ, "bits": 3}, BFLOAT16),
    "gptq 8": (gptq(8), {**GPTQ, "bits": 8}, BFLOAT16),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP}, BFLOAT16),
    "packed 4": (packed, compressed(INT4_GROUP, "pack-quantized"), BFLOAT16),
    "w8a8": (
        int8_channel,
        compressed({"num_bits": 8, "strategy": "channel"}, "int-quantized", DYNAMIC),
        INT8,
    ),
    "fp8 blocks": (fp8, {"quant_method": "fp8", "weight_block_size": [32, 32]}, E4M3),
    "nf4": (
        nf4,
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        BFLOAT16,
    ),
    "llm.int8()": (llm_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}, INT8),
}


def make(case: str, folder: Path, **config: Any) -> TinyLlama:
    quantize, quantization, _ = CASES[case]
    tiny = make_tiny_llama(folder, **config)
    quantize_model(tiny, quantize, quantization)
    return tiny


def distance(a: Tensor, b: Tensor) -> float:
    """Root mean square difference, as a share of the spread of `b`."""
    return float((a - b).square().mean().sqrt() / b.std())


class Dequantized:
    """A source whose linear layers are given as floats, so that no kernel rounds anything."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __contains__(self, name: str) -> bool:
        return name in self._source

    def linear(self, prefix: str, shape: tuple[int, int]) -> LinearForm:
        return DenseForm(dequantize(self._source.linear(prefix, shape)))


def engine_logits(tiny: TinyLlama, floats: bool = True) -> Tensor:
    """The engine's logits in float32, its linear layers dequantized or as they are served."""
    source: Any = source_of(tiny.folder)
    decoder = load(tiny, Dequantized(source) if floats else source)
    return paged_logits(decoder, TOKENS, [len(TOKENS)])


def load(tiny: TinyLlama, source: Any) -> Decoder:
    spec = decoder_spec(open_model_folder(tiny.folder))
    decoder = load_decoder(source, spec, torch.float32, torch.device("cpu"), "none")
    decoder.set_max_position(32)
    return decoder


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_dequantized_model(case: str, tmp_path: Path) -> None:
    tiny = make(case, tmp_path)
    wanted = tiny.logits(TOKENS)
    for floats, tolerance in ((True, EXACT), (False, CASES[case][2])):
        assert distance(engine_logits(tiny, floats), wanted) <= tolerance


@pytest.mark.parametrize("case", CASES)
def test_weights_stay_quantized(case: str, tmp_path: Path) -> None:
    tiny = make(case, tmp_path, num_hidden_layers=1)
    decoder = load(tiny, source_of(tiny.folder))
    for layer in decoder.layers:
        assert not isinstance(layer.qkv, DenseWeight)
        assert not isinstance(layer.output, DenseWeight)


def test_a_loaded_model_says_what_became_of_its_weights(tmp_path: Path) -> None:
    tiny = make("gptq 3", tmp_path, num_hidden_layers=1)
    config = EngineConfig(model=str(tiny.folder), device="cpu", max_model_len=32, num_threads=1)
    assert load_model(config).notes == [
        "7 linear layers are 3-bit GPTQ in groups of 32, for which there is no kernel: held in the "
        "next wider integers, of 4 or 8 bits"
    ]


def test_transformers_reads_the_same_folder_alike(tmp_path: Path) -> None:
    """What these tests write is what compressed-tensors takes for its own."""
    tiny = make("packed 4", tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        logits = theirs(torch.tensor([TOKENS])).logits[0].float()
    assert distance(engine_logits(tiny), logits) <= EXACT


def test_a_quantized_head(tmp_path: Path) -> None:
    tiny = make_tiny_llama(tmp_path)
    quantization = {**GPTQ, "bits": 4, "lm_head": True}
    quantize_model(tiny, gptq(4), quantization, head=True)
    wanted = tiny.logits(TOKENS)
    assert distance(engine_logits(tiny), wanted) <= EXACT


def test_a_tied_head_takes_the_embedding(tmp_path: Path) -> None:
    tiny = make("packed 4", tmp_path, tie_word_embeddings=True)
    wanted = tiny.logits(TOKENS)
    assert distance(engine_logits(tiny), wanted) <= EXACT


def test_biases_of_quantized_layers(tmp_path: Path) -> None:
    tiny = make("awq", tmp_path, attention_bias=True, mlp_bias=True)
    wanted = tiny.logits(TOKENS)
    assert distance(engine_logits(tiny), wanted) <= EXACT


def test_a_quantization_of_what_is_quantized_is_refused(tmp_path: Path) -> None:
    tiny = make("awq", tmp_path)
    with pytest.raises(ConfigError, match=r"already quantized \(awq int4 group 32\): set quantiz"):
        tiny.llm(quantization="int8")


def test_shards(tmp_path: Path) -> None:
    """Parts of one layer in different files, as a large checkpoint is split."""
    tiny = make("gptq 4", tmp_path)
    whole = engine_logits(tiny)
    path = tmp_path / "model.safetensors"
    tensors: dict[str, Tensor] = {}
    edit(tmp_path, tensors.update)
    path.unlink()
    shard_of = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(shard_of.values()):
        held = {name: tensors[name] for name in tensors if shard_of[name] == file}
        save_file(held, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shard_of}))
    assert torch.equal(engine_logits(tiny), whole)
    content = (tmp_path / "model-1.safetensors").read_bytes()
    (tmp_path / "model-1.safetensors").write_bytes(content[:-10])
    with pytest.raises(ModelError, match=r"model-1\.safetensors .* is truncated"):
        source_of(tmp_path)
