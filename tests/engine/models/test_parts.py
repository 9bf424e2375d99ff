"""Parts of a decoder: observers, biases, experts, and weights in other forms than floats."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import EngineConfig
from engine.errors import ConfigError, ModelError
from engine.loading import load_model
from engine.models.block import Layer, Mlp, run_block
from engine.models.decoder import Decoder, embed
from engine.models.experts import Experts, run_experts
from engine.models.load_decoder import load_decoder
from engine.models.tensors import Root, layer_linears
from kernels.layer_cache import LayerCache
from kernels.metadata import build_attention_metadata
from kernels.ops import LinearWeight, dequantize, pack_dense
from tests.engine.tiny_models import BLOCK, CASES, VOCABULARY, make_tiny, paged_logits

LENGTH = 24


def prompt() -> list[int]:
    return torch.randint(VOCABULARY, (LENGTH,)).tolist()


@pytest.mark.parametrize("case", list(CASES))
def test_parameters_and_bytes(case: str, tmp_path: Path) -> None:
    """Each weight is held once; the images' part of a model is neither counted nor read."""
    tiny = make_tiny(case, tmp_path)
    model = tiny.model
    if case == "gemma3_images":
        model = model.model.language_model
    decoder = tiny.decoder()
    assert decoder.spec.num_parameters == sum(p.numel() for p in model.parameters())
    assert decoder.nbytes == 4 * decoder.spec.num_parameters


@pytest.mark.parametrize("case", ["llama", "phi3", "gemma3", "qwen3_moe_sparse"])
def test_observers_see_the_input_of_every_linear_layer(case: str, tmp_path: Path) -> None:
    """And what they see, multiplied by the checkpoint's own weights, is what the layer computes."""
    tiny = make_tiny(case, tmp_path)
    decoder = tiny.decoder()
    spec = decoder.spec
    state = load_file(tmp_path / "model.safetensors")
    root = Root("model", "lm_head")
    metadata = build_attention_metadata([[0, 1, 2]], [LENGTH], [LENGTH], BLOCK)
    x, residual = None, embed(spec, decoder.embedding, torch.tensor(prompt()))
    for index, layer in enumerate(decoder.layers):
        seen: dict[str, torch.Tensor] = {}
        cache = LayerCache.allocate((3, spec.num_kv_heads, BLOCK, spec.head_dim), torch.float32)
        x, residual = run_block(
            spec,
            index,
            layer,
            x,
            residual,
            torch.arange(LENGTH),
            decoder.rotary_tables[index],
            cache,
            metadata,
            lambda name, rows, seen=seen: seen.update({name: rows.clone()}),
        )
        linears = layer_linears(spec, root, index)
        dense = [name for name in linears if not name.startswith("experts")]
        assert set(dense) <= set(seen) <= set(linears)
        for name, rows in seen.items():
            parts = linears[name]
            assert rows.shape[1] == parts.columns
            weights = torch.cat([state[f"{prefix}.weight"] for prefix in parts.prefixes])
            assert weights.shape == (sum(parts.rows), parts.columns)
        if spec.has_experts(index):
            chosen = [name for name in seen if name.endswith("down")]
            assert sum(len(seen[name]) for name in chosen) == LENGTH * 3
        else:
            down = torch.cat([state[f"{p}.weight"] for p in linears["down"].prefixes])
            out = seen["down"] @ down.T
            if layer.mlp_output_norm is None:
                torch.testing.assert_close(out, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@pytest.mark.parametrize("case", ["llama", "phi3", "gemma3_images", "qwen3_moe"])
def test_nothing_loaded_hangs_on_the_file(case: str, quantization: str, tmp_path: Path) -> None:
    """A mapped tensor would follow what is written over it."""
    decoder = make_tiny(case, tmp_path).decoder(quantization=quantization)
    tokens = prompt()
    expected = paged_logits(decoder, tokens, [LENGTH])
    path = tmp_path / "model.safetensors"
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(paged_logits(decoder, tokens, [LENGTH]), expected)


# A variation that a family declares, and what its case loses without it.
CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("mistral_window", {"layer_windows": (0, 0, 0)}),
    ("qwen2_window", {"layer_windows": (9, 9, 9)}),
    ("gemma2", {"attention_soft_cap": 0.0}),
    ("gemma2", {"logit_soft_cap": 0.0}),
    ("gemma2", {"attention_scale": 24**-0.5}),
    ("gemma2", {"embedding_scale": 1.0}),
    ("gemma2", {"activation": "silu"}),
    ("gemma3", {"local_rope": None}),
]


@pytest.mark.parametrize(("case", "change"), CHANGES)
def test_each_variation_is_felt(case: str, change: dict[str, Any], tmp_path: Path) -> None:
    """Else the tests against transformers would pass without it."""
    decoder = make_tiny(case, tmp_path).decoder()
    tokens = prompt()
    expected = paged_logits(decoder, tokens, [LENGTH])
    decoder.spec = dataclasses.replace(decoder.spec, **change)
    decoder.set_max_position(96)
    changed = paged_logits(decoder, tokens, [LENGTH])
    assert (changed - expected).abs().max() > 0.03


def test_longrope_beyond_and_within_its_original_length(tmp_path: Path) -> None:
    """An engine for short sequences computes what transformers does for them, and so for long."""
    tiny = make_tiny("phi3_longrope", tmp_path)
    for length, longest in ((30, 32), (40, 33)):
        tokens = torch.randint(VOCABULARY, (length,)).tolist()
        decoder = tiny.decoder(max_position=max(length, longest))
        logits = paged_logits(decoder, tokens, [17, length - 17])
        torch.testing.assert_close(logits, tiny.logits(tokens), rtol=1e-4, atol=3e-4)


@pytest.mark.parametrize(
    ("case", "longest", "note"),
    [
        ("gemma3_images", 96, "served for text only: images are not understood"),
        ("phi3_longrope", 33, "set max_model_len to at most 32"),
        ("phi3_longrope", 32, None),
        ("llama", 96, None),
    ],
)
def test_what_is_served_otherwise_is_said(
    case: str, longest: int, note: str | None, tmp_path: Path
) -> None:
    folder = str(make_tiny(case, tmp_path).folder)
    config = EngineConfig(model=folder, device="cpu", max_model_len=longest, num_threads=1)
    notes = load_model(config).notes
    assert len(notes) == (note is not None)
    assert note is None or note in notes[0]


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
def test_experts_give_each_token_what_they_give_it_alone(case: str, tmp_path: Path) -> None:
    decoder = make_tiny(case, tmp_path).decoder()
    experts = decoder.layers[0].mlp
    assert isinstance(experts, Experts)
    x = torch.randn(33, decoder.spec.hidden_size)
    together = run_experts(decoder.spec, experts, x)
    alone = torch.cat([run_experts(decoder.spec, experts, row[None]) for row in x])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    shuffled = torch.randperm(33)
    again = run_experts(decoder.spec, experts, x[shuffled])
    torch.testing.assert_close(again, together[shuffled], rtol=1e-4, atol=1e-4)


def widened(weight: LinearWeight) -> LinearWeight:
    return pack_dense(dequantize(weight).float(), weight.bias)


def widen(layer: Layer) -> Layer:
    mlp = layer.mlp
    if isinstance(mlp, Mlp):
        wide: Mlp | Experts = Mlp(widened(mlp.gate_up), widened(mlp.down))
    else:
        wide = Experts(mlp.router, tuple(map(widened, mlp.gate_up)), tuple(map(widened, mlp.down)))
    return dataclasses.replace(
        layer, qkv=widened(layer.qkv), output=widened(layer.output), mlp=wide
    )


@pytest.mark.parametrize("case", ["mixtral", "phi3", "gemma3", "qwen2"])
def test_int4_is_the_model_with_rounded_weights(case: str, tmp_path: Path) -> None:
    """Weight-only, so that it equals the float model of what the weights were rounded to."""
    tiny = make_tiny(case, tmp_path)
    float_decoder, decoder = tiny.decoder(), tiny.decoder(quantization="int4")
    tokens = prompt()
    wide = Decoder(
        decoder.spec,
        decoder.embedding,
        [widen(layer) for layer in decoder.layers],
        decoder.final_norm,
        pack_dense(torch.eye(decoder.spec.hidden_size)),
        torch.float32,
        torch.device("cpu"),
    )
    wide.set_max_position(96)
    decoder.head = float_decoder.head = wide.head
    ours, expected = (paged_logits(d, tokens, [20, 4]) for d in (decoder, wide))
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    exact = paged_logits(float_decoder, tokens, [20, 4])
    assert (exact - expected).norm() > 0.003 * exact.norm()  # the weights were rounded


def edit(folder: Path, **tensors: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    state = {k: v for k, v in load_file(path).items() if tensors.get(k, v) is not None}
    save_file({**state, **{k: v for k, v in tensors.items() if v is not None}}, path)


BIAS = "model.layers.1.self_attn.k_proj.bias"


def test_biases_that_the_model_does_not_have(tmp_path: Path) -> None:
    """GPTQ's writers add zeros, which are nothing; anything else would be lost."""
    tiny = make_tiny("llama", tmp_path)
    tokens = prompt()
    expected = tiny.logits(tokens)
    edit(tmp_path, **{BIAS: torch.zeros(32)})
    logits = paged_logits(tiny.decoder(), tokens, [LENGTH])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=3e-4)
    edit(tmp_path, **{BIAS: torch.ones(32)})
    with pytest.raises(
        ModelError, match=rf"model\.safetensors: tensor '{BIAS}' is not zero, but LlamaForCausalLM"
    ):
        tiny.decoder()


MISSING = [
    ("qwen2", BIAS),
    ("qwen3", "model.layers.2.self_attn.q_norm.weight"),
    ("phi3", "model.layers.0.self_attn.qkv_proj.weight"),
    ("gemma2", "model.layers.1.pre_feedforward_layernorm.weight"),
    ("gemma3_images", "language_model.model.layers.1.mlp.up_proj.weight"),
    ("mixtral", "model.layers.0.block_sparse_moe.gate.weight"),
    ("qwen3_moe", "model.layers.2.mlp.experts.5.down_proj.weight"),
]


@pytest.mark.parametrize(("case", "name"), MISSING)
def test_a_missing_or_misshapen_tensor_is_named(case: str, name: str, tmp_path: Path) -> None:
    tiny = make_tiny(case, tmp_path)
    edit(tmp_path, **{name: torch.zeros(3, 3)})
    with pytest.raises(ModelError, match=rf"safetensors: tensor '{name}' has shape \[3, 3\]"):
        tiny.decoder()
    edit(tmp_path, **{name: None})
    with pytest.raises(ModelError, match=rf"safetensors has no tensor '{name}'"):
        tiny.decoder()


def test_weights_that_cannot_be_quantized(tmp_path: Path) -> None:
    tiny = make_tiny("llama", tmp_path)
    name = "model.layers.1.self_attn.o_proj.weight"
    edit(tmp_path, **{name: torch.full((64, 64), float("nan"))})
    with pytest.raises(ModelError, match=rf"model\.safetensors: tensor '{name}'.* NaN"):
        tiny.decoder(quantization="int8")


def test_a_quantized_checkpoint_is_not_quantized_again(tmp_path: Path) -> None:
    spec = make_tiny("llama", tmp_path).decoder().spec

    class Source:
        quantization = "gptq int4 group 128"

    with pytest.raises(ConfigError, match=r"already quantized \(gptq int4 group 128\)"):
        load_decoder(Source(), spec, torch.float32, torch.device("cpu"), "int8")  # type: ignore[arg-type]
