"""A GPU serves as a CPU does, captured steps say what eager ones say; skipped on other machines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine import LLM, SamplingParams
from engine.request import TokenLogprobs
from tests.engine.tiny_models import make_tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# Of very different lengths: prompts are split, and steps hold prompts beside decodes.
PROMPTS = [[5, 4, 3, 2, 1], list(range(100)), [7] * 11, list(range(60, 90)), [9]]
SMALL = {"max_model_len": 192, "max_num_seqs": 4, "max_num_batched_tokens": 48}


def serve(folder: Path, **knobs: object) -> tuple[list[list[int]], list[TokenLogprobs], list[str]]:
    """Tokens of greedy and of drawn requests, log-probabilities of first tokens, and notes."""
    llm = LLM(str(folder), kv_cache_memory_bytes=1 << 24, **SMALL, **knobs)
    greedy = SamplingParams(temperature=0.0, max_tokens=20, logprobs=4)
    drawn = SamplingParams(temperature=0.8, top_k=30, top_p=0.9, seed=3, max_tokens=20)
    outputs = [out.outputs[0] for kind in (greedy, drawn) for out in llm.generate(PROMPTS, kind)]
    first = [out.logprobs[0] for out in outputs[: len(PROMPTS)] if out.logprobs]
    return [list(out.token_ids) for out in outputs], first, list(llm._loaded.notes)


def assert_close(ours: list[TokenLogprobs], theirs: list[TokenLogprobs], allowed: float) -> None:
    assert len(ours) == len(theirs) == len(PROMPTS)
    for our, their in zip(ours, theirs, strict=True):
        both = our.top.keys() & their.top.keys()
        assert len(both) >= 3
        assert all(abs(our.top[token] - their.top[token]) < allowed for token in both)


@pytest.mark.parametrize("case", ["llama", "qwen3_window"])
def test_captured_steps_say_what_eager_ones_and_a_cpu_say(tmp_path: Path, case: str) -> None:
    make_tiny(case, tmp_path, hidden_size=256, head_dim=64, intermediate_size=512)
    tokens, first, notes = serve(tmp_path, device="cuda", dtype="float32")
    assert not [note for note in notes if "CUDA graphs" in note]
    eager, eager_first, _ = serve(tmp_path, device="cuda", dtype="float32", cuda_graphs=False)
    # Padding changes how products are summed, which may turn a choice of near equals.
    same = sum(a == b for a, b in zip(tokens, eager, strict=True))
    assert same >= len(tokens) - 1
    assert_close(first, eager_first, 1e-2)
    _, cpu_first, _ = serve(tmp_path, device="cpu", dtype="float32")
    assert_close(first, cpu_first, 0.25)


@pytest.mark.parametrize(("quantization", "cache"), [("int4", "int8"), ("int8", "fp8")])
def test_quantized_models_are_captured_too(tmp_path: Path, quantization: str, cache: str) -> None:
    make_tiny("llama", tmp_path, hidden_size=256, head_dim=64, intermediate_size=512)
    knobs = {"quantization": quantization, "kv_cache_dtype": cache, "dtype": "bfloat16"}
    _, first, notes = serve(tmp_path, device="cuda", **knobs)
    assert not [note for note in notes if "CUDA graphs" in note]
    _, eager, _ = serve(tmp_path, device="cuda", cuda_graphs=False, **knobs)
    _, cpu, _ = serve(tmp_path, device="cpu", **knobs)
    assert_close(first, eager, 0.1)
    assert_close(first, cpu, 0.5)


def test_a_cache_of_measured_size_serves_and_is_rebuilt(tmp_path: Path) -> None:
    make_tiny("llama", tmp_path, hidden_size=256, head_dim=64, intermediate_size=512)
    llm = LLM(str(tmp_path), device="cuda", gpu_memory_utilization=0.5, **SMALL)
    sampling = SamplingParams(temperature=0.0, max_tokens=8)
    before = [out.outputs[0].token_ids for out in llm.generate(PROMPTS, sampling)]
    llm.reconfigure(block_size=32, max_num_seqs=2)
    again = [out.outputs[0].token_ids for out in llm.generate(PROMPTS, sampling)]
    assert [len(tokens) for tokens in before + again] == [8] * (2 * len(PROMPTS))
