"""`kv_cache_dtype`: more blocks in the same bytes, and tokens close to those of the full cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine import EngineConfig, SamplingParams
from engine.kv_cache import KVCache, cache_bytes, cache_dtype, kv_bytes_per_token
from engine.runner import ModelRunner
from kernels.metadata import build_attention_metadata
from tests.engine.tiny_llama import make_tiny_llama
from tests.engine.tiny_models import VOCABULARY, TinyModel, make_tiny

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny_llama(tmp_path_factory.mktemp("model"), seed=8)


def runner_of(tiny: TinyModel, **knobs: object) -> ModelRunner:
    runner = tiny.llm(**knobs).engine.executor
    assert isinstance(runner, ModelRunner)
    return runner


@pytest.mark.parametrize(
    ("knob", "expected"),
    [("auto", torch.bfloat16), ("int8", torch.int8), ("fp8", torch.float8_e4m3fn)],
)
def test_dtype_of_the_cache(knob: str, expected: torch.dtype) -> None:
    assert cache_dtype(EngineConfig(kv_cache_dtype=knob), torch.bfloat16) == expected


@pytest.mark.parametrize("knob", DTYPES)
def test_more_blocks_fit_the_same_bytes(tiny: TinyModel, knob: str) -> None:
    budget, size = 200_000, 8
    runner = runner_of(tiny, kv_cache_memory_bytes=budget, block_size=size)
    before = runner.num_blocks
    config = EngineConfig(kv_cache_memory_bytes=budget, block_size=size, kv_cache_dtype=knob)
    runner.reconfigure(config, 96)
    spec = runner.decoder.spec
    # Of 3 layers with 2 heads of 16 elements: a byte each, and a float32 scale for each head.
    per_token = 2 * 3 * 2 * (16 + 4)
    assert kv_bytes_per_token(spec, DTYPES[knob]) == per_token
    assert runner.num_blocks == budget // (per_token * size) > 3 * before
    assert runner.cache.nbytes == runner.num_blocks * per_token * size
    assert runner.cache.nbytes == cache_bytes(config, spec, torch.float32, 96, runner.num_blocks)
    assert {layer.keys.dtype for layer in runner.cache.layers} == {DTYPES[knob]}


@pytest.mark.parametrize("knob", DTYPES)
@pytest.mark.parametrize("case", ["llama", "gemma2"])
def test_tokens_are_close_and_do_not_depend_on_the_schedule(
    tmp_path: Path, knob: str, case: str
) -> None:
    """A token's scale is its own, so chunks, prefix hits and preemption round alike."""
    tiny = make_tiny(case, tmp_path, seed=9)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in (40, 9, 25)]
    prompts.append(prompts[0][:24] + prompts[1])
    llm = tiny.llm(block_size=8, kv_cache_dtype=knob)
    first = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)]
    llm.reconfigure(max_num_batched_tokens=7, max_num_seqs=4)
    chunked = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)]
    assert llm.engine.pool.hit_tokens > 0
    llm.reconfigure(kv_cache_dtype="auto")
    exact = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)]
    # What a step's own tokens attend to is read from the cache too, so nothing differs.
    same = sum(
        a == b for x, y in zip(first, chunked, strict=True) for a, b in zip(x, y, strict=True)
    )
    close = sum(
        a == b for x, y in zip(first, exact, strict=True) for a, b in zip(x, y, strict=True)
    )
    assert same > 0.9 * 4 * 24
    # Random weights let one other token change all that follow; chance alone agrees on one of 128.
    assert close > 0.1 * 4 * 24


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_logits_are_those_of_rounded_keys_and_values(tiny: TinyModel, dtype: torch.dtype) -> None:
    """Off by what the rounding of an element is, and not by nothing."""
    decoder = tiny.decoder()
    spec = decoder.spec
    tokens = torch.randint(VOCABULARY, (40,))
    metadata = [build_attention_metadata([[0, 1, 2, 3, 4]], [40], [40], 8)] * spec.num_layers
    logits = []
    for kind in (torch.float32, dtype):
        cache = KVCache.allocate(spec, 5, 8, cache_dtype=kind, device=torch.device("cpu"))
        with torch.inference_mode():
            hidden = decoder.forward(tokens, torch.arange(40), cache.layers, metadata)
            logits.append(decoder.logits(hidden))
    error = (logits[1] - logits[0]).norm() / logits[0].norm()
    assert 1e-4 < error < (0.05 if dtype == torch.int8 else 0.2)
