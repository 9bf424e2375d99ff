"""Whole models from GGUF files: transformers' logits on the weights that a file stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from autotune.model_info import read_model_info
from engine import LLM, EngineConfig, SamplingParams
from engine.checkpoints.gguf.file import GgufFile
from engine.checkpoints.gguf.source import GgufSource
from engine.checkpoints.model_folder import open_model_folder
from engine.errors import ModelError
from engine.loading import load_model
from engine.models.load_decoder import load_decoder
from engine.models.registry import decoder_spec
from kernels.weights import Int4Weight, Int8GroupWeight
from tests.engine.checkpoints.gguf_files import write_model
from tests.engine.checkpoints.test_gguf_tokenizer import embedded_metadata
from tests.engine.tiny_models import TinyModel, make_tiny, paged_logits

# Blocks of the K types are 256 long.
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
MIXED = {
    "attn_q.weight": Type.Q4_K,
    "attn_k.weight": Type.Q4_0,
    "attn_v.weight": Type.Q6_K,
    "attn_output.weight": Type.F16,
    "ffn_gate.weight": Type.Q8_0,
    "ffn_up.weight": Type.Q8_0,
    "ffn_down.weight": Type.Q6_K,
    "output.weight": Type.Q8_0,
    "token_embd.weight": Type.Q8_0,
}


def as_gguf(
    tiny: TinyModel, path: Path, types: dict[str, Type], metadata: dict[str, Any] | None = None
) -> None:
    """Write the model as GGUF, and give `tiny` the weights that the file stands for."""
    config = tiny.model.config.to_dict()
    config["rope_theta"] = 10000.0
    state = dict(tiny.model.state_dict())
    stored = write_model(path, config["model_type"], config, state, types, metadata)
    tiny.model.load_state_dict(stored, strict=False)


def logits(path: Path, tokens: list[int], chunks: list[int]) -> tuple[torch.Tensor, GgufSource]:
    source = GgufSource(path)
    folder = open_model_folder(path)
    device = torch.device("cpu")
    decoder = load_decoder(source, decoder_spec(folder), torch.float32, device, "none")
    decoder.set_max_position(96)
    return paged_logits(decoder, tokens, chunks), source


@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen2_tied"])
@pytest.mark.parametrize("types", [{}, {"weight": Type.F16}, MIXED], ids=["f32", "f16", "mixed"])
def test_logits_are_those_of_the_stored_weights(case, types, tmp_path):
    tied = case.endswith("_tied")
    if types == {"weight": Type.F16}:
        types = dict.fromkeys(MIXED, Type.F16)
    tiny = make_tiny(case.removesuffix("_tied"), tmp_path, tie_word_embeddings=tied, **WIDE)
    path = tmp_path / "model.gguf"
    as_gguf(tiny, path, types)
    tokens = torch.randint(128, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    actual, _ = logits(path, tokens, [25, 1, 14])
    expected = tiny.logits(tokens)
    error = (actual - expected).abs().max() / expected.std()
    # Kept integers are widened to bf16 on the way into the tiles.
    assert error < (0.06 if types is MIXED else 1e-4), float(error)


def test_integers_stay_integers_and_what_does_not_is_told(tmp_path):
    tiny = make_tiny("llama", tmp_path, **WIDE)
    path = tmp_path / "mixed.gguf"
    as_gguf(tiny, path, MIXED)
    loaded = load_model(EngineConfig(model=str(path), device="cpu", max_model_len=64))
    mlp = loaded.runner.decoder.layers[0].mlp
    assert isinstance(mlp.gate_up, Int8GroupWeight)
    source = GgufSource(path)
    form = source.linear("model.layers.0.self_attn.k_proj", (128, 256))
    assert (form.bits, form.group_size) == (4, 32)
    note = next(n for n in loaded.notes if "Q6_K" in n)
    assert note == (
        "mixed.gguf: 4 linear layers are Q6_K, for which there is no kernel: dequantized"
    )
    assert source.quantization is not None
    assert source.quantization.startswith("gguf Q")


def test_a_model_of_one_type_is_held_in_it(tmp_path):
    tiny = make_tiny("llama", tmp_path, **WIDE)
    path = tmp_path / "q4.gguf"
    as_gguf(tiny, path, dict.fromkeys(MIXED, Type.Q4_0))
    loaded = load_model(EngineConfig(model=str(path), device="cpu", max_model_len=64))
    layer = loaded.runner.decoder.layers[0]
    assert all(isinstance(w, Int4Weight) for w in (layer.qkv, layer.output, layer.mlp.down))
    assert loaded.notes == []


def test_llama_3_frequencies_come_as_divisors(tmp_path):
    """llama.cpp stores Llama 3.1's rotary scaling as one number a frequency."""
    divisors = [1.0, 1.5, 2.0, 2.0, 4.0, 4.0, 8.0, 8.0]
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": divisors,
        "long_factor": divisors,
        "attention_factor": 1.0,
        "factor": 1.0,
        "original_max_position_embeddings": 256,
    }
    tiny = make_tiny("llama", tmp_path, rope_parameters=rope)
    path = tmp_path / "model.gguf"
    state = {**tiny.model.state_dict(), "rope_freqs.weight": torch.tensor(divisors)}
    config = {**tiny.model.config.to_dict(), "rope_theta": 10000.0}
    write_model(path, "llama", config, state, {})
    tokens = torch.randint(128, (60,), generator=torch.Generator().manual_seed(4)).tolist()
    actual, _ = logits(path, tokens, [60])
    torch.testing.assert_close(actual, tiny.logits(tokens), rtol=1e-4, atol=3e-4)


def test_text_in_and_out_with_the_tokenizer_of_the_file(tmp_path):
    metadata = embedded_metadata()
    vocabulary = len(metadata["tokenizer.ggml.tokens"])
    tiny = make_tiny("llama", tmp_path / "float", vocab_size=vocabulary)
    path = tmp_path / "alone" / "model.gguf"
    path.parent.mkdir()
    as_gguf(tiny, path, {}, metadata)
    llm = LLM(str(path.parent), device="cpu", max_model_len=64, num_threads=1, dtype="float32")
    (output,) = llm.generate(["def main("], SamplingParams(max_tokens=8, temperature=0.0))
    prompt = llm.tokenizer.encode("def main(")
    assert output.outputs[0].token_ids == tiny.greedy(prompt, 8)[: len(output.outputs[0].token_ids)]
    assert output.outputs[0].text
    info = read_model_info(EngineConfig(model=str(path)))
    assert info.architecture == "LlamaForCausalLM"
    assert info.vocab_size == vocabulary


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llama.expert_count": 8}, "mixtures of experts"),
        ({"split.count": 3}, "one of 3 parts"),
        ({"llama.rope.dimension_count": 8}, "differs from the head size"),
        ({"llama.rope.scaling.type": "odd"}, "'odd' is not read"),
    ],
)
def test_what_is_not_read_is_named(change, message, tmp_path):
    tiny = make_tiny("llama", tmp_path)
    path = tmp_path / "other.gguf"
    as_gguf(tiny, path, {}, change)
    with pytest.raises(ModelError, match=message):
        open_model_folder(path)


def test_another_architecture_and_a_missing_tensor_are_named(tmp_path):
    path = tmp_path / "bert.gguf"
    writer = gguf.GGUFWriter(path, "bert")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match="architecture 'bert' is not read; llama, qwen2 are"):
        open_model_folder(path)
    tiny = make_tiny("llama", tmp_path / "tiny")
    path = tmp_path / "short.gguf"
    config = {**tiny.model.config.to_dict(), "rope_theta": 10000.0}
    state = {n: t for n, t in tiny.model.state_dict().items() if "layers.1.mlp.up" not in n}
    write_model(path, "llama", config, state, {})
    with pytest.raises(ModelError, match=r"short\.gguf has no tensor 'blk\.1\.ffn_up\.weight'"):
        load_model(EngineConfig(model=str(path), device="cpu", max_model_len=64))


def test_a_scale_that_is_no_number_is_named(tmp_path):
    tiny = make_tiny("llama", tmp_path)
    path = tmp_path / "odd.gguf"
    as_gguf(tiny, path, {"ffn_up.weight": gguf.GGMLQuantizationType.Q8_0}, {})
    place = GgufFile(path).tensors["blk.2.ffn_up.weight"].offset
    content = bytearray(path.read_bytes())
    content[place : place + 2] = b"\x00\x7c"  # infinity
    path.write_bytes(content)
    message = r"odd\.gguf: tensor 'blk\.2\.ffn_up\.weight' holds scales that are infinite"
    with pytest.raises(ModelError, match=message):
        load_model(EngineConfig(model=str(path), device="cpu", max_model_len=64))
