"""Greedy tokens are transformers', whatever the schedule; logits are close in every dtype."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import LLM, SamplingParams
from engine.batch import Batch, ScheduledSequence
from engine.block_tables import BlockTables
from engine.request import Request
from kernels.ops import dequantize
from kernels.reference import quantize_rows
from tests.engine.tiny_llama import VARIANTS, VOCABULARY, TinyLlama, make_tiny_llama

OUTPUT = 24


def greedy(max_tokens: int = OUTPUT) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def random_prompts(seed: int, lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def assert_tokens_are_transformers(
    tiny: TinyLlama, prompt: list[int], tokens: list[int], expected: list[int]
) -> int:
    """Compare up to the first tie; return how many tokens were compared."""
    certain = tiny.certain(prompt, expected)
    assert len(tokens) == len(expected)
    assert tokens[:certain] == expected[:certain]
    return certain


@pytest.fixture(scope="module", params=list(VARIANTS))
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    return make_tiny_llama(tmp_path_factory.mktemp("model"), **VARIANTS[request.param])


def test_greedy_tokens_of_every_variant(variant: TinyLlama) -> None:
    batch = random_prompts(1, [3, 20, 33, 1, 17])
    compared = 0
    for prompt, output in zip(batch, variant.llm().generate(batch, greedy()), strict=True):
        expected = variant.greedy(prompt, OUTPUT)
        compared += assert_tokens_are_transformers(
            variant, prompt, output.outputs[0].token_ids, expected
        )
    assert compared > 60  # else ties would have hidden what this is to show


def test_mistral_sees_a_window(tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(3)
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        sliding_window=16,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = MistralForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    tiny = TinyLlama(tmp_path, model)
    llm = tiny.llm(max_model_len=None)
    assert llm.engine.max_model_len == 256
    (prompt,) = random_prompts(4, [30])
    tokens = llm.generate([prompt], greedy())[0].outputs[0].token_ids
    assert assert_tokens_are_transformers(tiny, prompt, tokens, tiny.greedy(prompt, OUTPUT)) > 8


@lru_cache(maxsize=1)
def _shared(folder: Path) -> tuple[TinyLlama, LLM]:
    tiny = make_tiny_llama(
        folder, seed=5, rope_parameters=VARIANTS["llama3_rope"]["rope_parameters"]
    )
    return tiny, tiny.llm()


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


_references: dict[tuple[int, ...], list[int]] = {}


def reference(tiny: TinyLlama, prompt: list[int], length: int) -> list[int]:
    key = tuple(prompt)
    if key not in _references:
        _references[key] = tiny.greedy(prompt, OUTPUT)
    return _references[key][:length]


@st.composite
def schedules(draw: st.DrawFn) -> dict[str, Any]:
    """Knobs of one engine, from roomy to so tight that requests must be preempted."""
    block_size = draw(st.sampled_from([8, 16, 32]))
    max_num_seqs = draw(st.integers(1, 6))
    tokens_per_step = draw(st.one_of(st.integers(max_num_seqs, 12), st.integers(13, 200)))
    # At least one sequence of 96 tokens must fit: 96 / block_size blocks.
    spare = draw(st.sampled_from([0, 1, 2, 40]))
    per_block = block_size * 2 * 3 * 2 * 16 * 4  # keys and values, layers, heads, head_dim, bytes
    return {
        "block_size": block_size,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": tokens_per_step,
        "long_prefill_token_threshold": draw(st.sampled_from([0, 5, 16])),
        "kv_cache_memory_bytes": (96 // block_size + spare) * per_block,
        "enable_prefix_caching": draw(st.booleans()),
        "scheduling_policy": draw(st.sampled_from(["fcfs", "priority", "sjf"])),
        "batching_mode": draw(st.sampled_from(["continuous", "continuous", "static"])),
    }


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    knobs=schedules(),
    picks=st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 40), st.integers(1, OUTPUT), st.integers(0, 3)),
        min_size=2,
        max_size=9,
    ),
)
def test_greedy_tokens_do_not_depend_on_the_schedule(
    shared_folder: Path, knobs: dict[str, Any], picks: list[tuple[int, int, int, int]]
) -> None:
    """Chunks, block sizes, prefix hits, preemptions, policies; prompts with common prefixes."""
    tiny, llm = _shared(shared_folder)
    llm.reconfigure(**knobs)
    stems = random_prompts(9, [8, 16, 17, 30, 33, 40])
    engine = llm.engine
    expected, prompts, got = {}, {}, {}
    for index, (stem, cut, length, priority) in enumerate(picks):
        prompt = stems[stem] + stems[(stem + 1) % 6][: cut // 2]
        name = str(index)
        prompts[name], expected[name] = prompt, reference(tiny, prompt, length)
        got[name] = []
        engine.add(name, prompt, greedy(length), priority=priority)
    for _ in range(5000):
        if not engine.has_unfinished:
            break
        for output in engine.step():
            got[output.request_id] += output.token_ids
            assert output.refusal is None
    assert not engine.has_unfinished
    for name, tokens in got.items():
        assert_tokens_are_transformers(tiny, prompts[name], tokens, expected[name])
    assert engine.pool.num_used == 0


def test_a_tiny_cache_preempts_and_stays_exact(shared_folder: Path) -> None:
    tiny, llm = _shared(shared_folder)
    llm.reconfigure(
        block_size=8,
        kv_cache_memory_bytes=13 * 8 * 768,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        long_prefill_token_threshold=0,
        enable_prefix_caching=False,
        scheduling_policy="fcfs",
        batching_mode="continuous",
    )
    records = []
    llm.engine.on_step = records.append
    batch = random_prompts(21, [16, 18, 20, 22])
    outputs = llm.generate(batch, greedy())
    llm.engine.on_step = None
    assert sum(record.preemptions for record in records) > 0
    for prompt, output in zip(batch, outputs, strict=True):
        assert_tokens_are_transformers(
            tiny, prompt, output.outputs[0].token_ids, tiny.greedy(prompt, OUTPUT)
        )


def test_a_prefix_hit_skips_work_and_stays_exact(shared_folder: Path) -> None:
    tiny, llm = _shared(shared_folder)
    llm.reconfigure(
        block_size=8,
        kv_cache_memory_bytes=60 * 8 * 768,
        enable_prefix_caching=True,
        max_num_batched_tokens=64,
        max_num_seqs=8,
        scheduling_policy="fcfs",
        batching_mode="continuous",
    )
    (prompt,) = random_prompts(31, [40])
    first, second = (llm.generate([prompt], greedy())[0] for _ in range(2))
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens >= 32
    assert second.outputs[0].token_ids == first.outputs[0].token_ids
    assert_tokens_are_transformers(
        tiny, prompt, first.outputs[0].token_ids, tiny.greedy(prompt, OUTPUT)
    )


def all_logits(llm: LLM, tokens: list[int], chunks: list[int]) -> torch.Tensor:
    """Logits of every position, computed in chunks through the paged cache."""
    runner = llm.engine.executor
    size = llm.config.block_size
    table = list(range(-(-len(tokens) // size)))[::-1]  # pages out of order
    request = Request("probe", tokens, greedy(), 0.0, tables=BlockTables([table]))
    parts, start = [], 0
    with torch.inference_mode():
        for chunk in chunks:
            sequence = ScheduledSequence(request, start, chunk, True)
            ids, positions, _, layouts = runner._inputs.prepare(Batch([sequence], chunk == 1))
            hidden = runner.decoder.forward(
                ids, positions, runner.cache.layers, layouts * len(runner.cache.layers)
            )
            parts.append(runner.decoder.logits(hidden))
            start += chunk
    return torch.cat(parts).float()


CHUNKS = [[40], [13, 1, 1, 20, 5], [1] * 40]


@pytest.mark.parametrize("chunks", CHUNKS)
def test_logits_in_float32(variant: TinyLlama, chunks: list[int]) -> None:
    (tokens,) = random_prompts(41, [40])
    logits = all_logits(variant.llm(), tokens, chunks)
    torch.testing.assert_close(logits, variant.logits(tokens), rtol=1e-4, atol=3e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_in_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    """As far from the float32 model with the same weights as transformers is, times 2."""
    tiny = make_tiny_llama(tmp_path, seed=6, dtype=dtype, initializer_range=0.1)
    (tokens,) = random_prompts(42, [40])
    theirs = tiny.logits(tokens)
    tiny.model.float()
    exact = tiny.logits(tokens)
    llm = tiny.llm()
    assert llm.engine.executor.decoder.dtype == dtype
    for chunks in CHUNKS:
        ours = all_logits(llm, tokens, chunks)
        assert (ours - exact).norm() <= 2.0 * (theirs - exact).norm()
        assert (ours - exact).abs().max() <= 3.0 * (theirs - exact).abs().max()


def round_inputs(module: torch.nn.Linear) -> None:
    """Let a module see its inputs as dynamic int8 sees them."""

    def rounded(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        q, scales = quantize_rows(inputs[0].double())
        return ((q.double() * scales).float(),)

    module.register_forward_pre_hook(rounded)


@pytest.mark.parametrize("method", ["int8", "int4"])
@pytest.mark.parametrize("tied", [False, True])
def test_quantized_logits_are_those_of_the_dequantized_model(
    tmp_path: Path, method: str, tied: bool
) -> None:
    """Activations rounded as well where int8 rounds them: everywhere, or with int4 in the head."""
    tiny = make_tiny_llama(
        tmp_path,
        seed=7,
        hidden_size=128,
        intermediate_size=256,
        initializer_range=0.1,
        tie_word_embeddings=tied,
    )
    (tokens,) = random_prompts(43, [40])
    llm = tiny.llm(quantization=method)
    decoder = llm.engine.executor.decoder
    float_logits = tiny.logits(tokens)
    for layer, theirs in zip(decoder.layers, tiny.model.model.layers, strict=True):
        attention, mlp = theirs.self_attn, theirs.mlp
        fused = [
            (layer.qkv, [attention.q_proj, attention.k_proj, attention.v_proj]),
            (layer.output, [attention.o_proj]),
            (layer.mlp.gate_up, [mlp.gate_proj, mlp.up_proj]),
            (layer.mlp.down, [mlp.down_proj]),
        ]
        for weight, modules in fused:
            rows = dequantize(weight).split([m.out_features for m in modules])
            for module, part in zip(modules, rows, strict=True):
                module.weight.data = part.float().clone()
                if method == "int8":
                    round_inputs(module)
    tiny.model.lm_head.weight = torch.nn.Parameter(dequantize(decoder.head).float().clone())
    round_inputs(tiny.model.lm_head)
    expected = tiny.logits(tokens)
    ours = all_logits(llm, tokens, [40])
    quantization_error = (expected - float_logits).norm() / float_logits.norm()
    assert quantization_error > 0.003  # the reference is really quantized
    assert (ours - expected).norm() / expected.norm() < 0.01
