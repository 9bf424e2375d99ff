"""Folding leaves the function of every family as it was, whatever the scales."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.checkpoints.model_folder import open_model_folder
from engine.checkpoints.open_source import open_source
from engine.models.load_decoder import load_decoder
from engine.models.registry import decoder_spec
from engine.quantize.folding import LayerFloats, layer_folds
from engine.quantize.forms import DenseForm, LinearForm
from engine.quantize.overlay import Overlay
from tests.engine.tiny_models import make_tiny, paged_logits

CPU = torch.device("cpu")
CASES = ("llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "mixtral", "qwen3_moe")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_logits_stay(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make_tiny(case, tmp_path, dtype=dtype)
    folder = open_model_folder(tmp_path)
    source, spec = open_source(folder), decoder_spec(folder)
    generator = torch.Generator().manual_seed(1)
    forms: dict[str, LinearForm] = {}
    changed: dict[str, torch.Tensor] = {}
    for index in range(spec.num_layers):
        floats = LayerFloats(source, spec, index, CPU)
        before = {prefix: weight.clone() for prefix, weight in floats.weights.items()}
        folds = layer_folds(spec, floats.linears)
        assert folds
        for fold in folds:
            columns = floats.linears[fold.consumer].columns
            scales = fold.tie(torch.exp(torch.randn(columns, generator=generator)))
            applied = floats.fold(fold, scales)
            # A difference from 1 in bfloat16 holds small factors coarsely.
            torch.testing.assert_close(applied, scales, rtol=0.3, atol=1e-6)
        moved = [p for p, weight in floats.weights.items() if not torch.equal(weight, before[p])]
        experts = [p for p in before if ".experts." in p and "down" not in p and "w2" not in p]
        assert set(before) - set(experts) <= set(moved)
        forms |= {prefix: DenseForm(weight) for prefix, weight in floats.weights.items()}
        changed |= floats.changed
        assert all(tensor.dtype == dtype for tensor in floats.changed.values())
    tokens = torch.randint(0, spec.vocab_size, (30,), generator=generator).tolist()
    # Computed in float32 whatever is stored: what a norm's weight lost in rounding, columns gave
    # back. Only biases of bfloat16 are a little off.
    logits = []
    for tensors in (source, Overlay(source, forms, changed)):
        decoder = load_decoder(tensors, spec, torch.float32, CPU, "none")
        decoder.set_max_position(64)
        logits.append(paged_logits(decoder, tokens, [30]))
    tolerance = 2e-4 if dtype == torch.float32 or not spec.qkv_bias else 0.05
    scale = float(logits[0].abs().max())
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=tolerance * scale)


def test_a_factor_of_zero_stays(tmp_path: Path) -> None:
    tiny = make_tiny("llama", tmp_path)
    tiny.model.model.layers[0].input_layernorm.weight.data[5] = 0.0
    tiny.model.save_pretrained(tmp_path)
    folder = open_model_folder(tmp_path)
    spec = decoder_spec(folder)
    floats = LayerFloats(open_source(folder), spec, 0, CPU)
    fold = layer_folds(spec, floats.linears)[0]
    applied = floats.fold(fold, torch.full((spec.hidden_size,), 2.0))
    assert float(applied[5]) == 1.0
    assert bool((applied[:5] == 2.0).all())
    assert bool(torch.isfinite(floats.weights["model.layers.0.self_attn.q_proj"]).all())
