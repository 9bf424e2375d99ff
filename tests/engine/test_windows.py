"""Models with windows give transformers' tokens from caches that hold what is seen and no more."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import LLM, EngineConfig, SamplingParams
from engine.block_groups import most_owned_blocks
from engine.kv_cache import cache_bytes
from engine.runner import ModelRunner
from engine.step_record import StepRecord
from tests.engine.tiny_models import FULL, SLIDING, VOCABULARY, TinyModel, make_tiny

OUTPUT = 24
LONGEST = 96
# Case, changes of its config, and the windows of the block groups that follow.
MODELS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "all": ("mistral_window", {}, (9,)),
    "alternating": ("gemma2", {}, (0, 9, 9)),
    # Two full layers and three windowed ones: the second group of those is not filled.
    "padded": (
        "qwen3_window",
        {"num_hidden_layers": 5, "layer_types": [SLIDING, FULL, FULL, SLIDING, SLIDING]},
        (0, 9, 9),
    ),
}


def greedy(max_tokens: int = OUTPUT) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def random_prompts(seed: int, lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def bytes_for(llm: LLM, num_blocks: int, block_size: int) -> int:
    runner = llm.engine.executor
    assert isinstance(runner, ModelRunner)
    config = EngineConfig(block_size=block_size)
    decoder = runner.decoder
    return cache_bytes(config, decoder.spec, decoder.dtype, LONGEST, num_blocks)


@lru_cache(maxsize=3)
def loaded(folder: Path, name: str) -> tuple[TinyModel, LLM]:
    case, changes, _ = MODELS[name]
    tiny = make_tiny(case, folder / name, seed=5, **changes)
    return tiny, tiny.llm(max_model_len=LONGEST)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("windows")


_references: dict[tuple[str, tuple[int, ...]], tuple[list[int], int]] = {}


def reference(name: str, tiny: TinyModel, prompt: list[int]) -> tuple[list[int], int]:
    """transformers' tokens, and how many of them are not near a tie."""
    key = (name, tuple(prompt))
    if key not in _references:
        expected = tiny.greedy(prompt, OUTPUT)
        _references[key] = expected, tiny.certain(prompt, expected)
    return _references[key]


def assert_tokens(name: str, tiny: TinyModel, prompt: list[int], tokens: list[int]) -> int:
    """Compare with transformers up to the first tie; return how many tokens were compared."""
    expected, certain = reference(name, tiny, prompt)
    compared = min(certain, len(tokens))
    assert tokens[:compared] == expected[:compared]
    return compared


def serve(llm: LLM, jobs: list[tuple[list[int], int, int]]) -> list[list[int]]:
    """Tokens of (prompt, number of tokens, priority), checked for integrity after each step."""
    engine = llm.engine
    got: dict[str, list[int]] = {}
    for index, (prompt, length, priority) in enumerate(jobs):
        got[str(index)] = []
        engine.add(str(index), prompt, greedy(length), priority=priority)
    for _ in range(5000):
        if not engine.has_unfinished:
            break
        for output in engine.step():
            got[output.request_id] += output.token_ids
            assert output.refusal is None
        engine.scheduler.check_integrity()
    assert not engine.has_unfinished
    assert engine.pool.num_used == 0
    return list(got.values())


@pytest.mark.parametrize("name", MODELS)
def test_groups_of_the_model(folder: Path, name: str) -> None:
    _, llm = loaded(folder, name)
    assert llm.engine.pool.windows == MODELS[name][2]
    runner = llm.engine.executor
    assert isinstance(runner, ModelRunner)
    # As many tensors as a group has layers, and as many bytes as the budget was counted in.
    size = max(len(group.layers) for group in runner.groups)
    assert len({id(cache) for cache in runner.cache.layers}) == size
    pool = llm.engine.pool
    assert runner.cache.nbytes == bytes_for(llm, pool.num_blocks, pool.block_size)


@st.composite
def schedules(draw: st.DrawFn) -> dict[str, Any]:
    """Knobs of one engine, from roomy to so tight that requests must be preempted."""
    max_num_seqs = draw(st.integers(1, 6))
    return {
        "block_size": draw(st.sampled_from([8, 16])),
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": draw(
            st.one_of(st.integers(max_num_seqs, 12), st.integers(13, 200))
        ),
        "long_prefill_token_threshold": draw(st.sampled_from([0, 5, 16])),
        "enable_prefix_caching": draw(st.booleans()),
        "scheduling_policy": draw(st.sampled_from(["fcfs", "priority", "sjf"])),
        "batching_mode": draw(st.sampled_from(["continuous", "continuous", "static"])),
    }


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    knobs=schedules(),
    spare=st.sampled_from([0, 1, 2, 5, 60]),
    picks=st.lists(
        st.tuples(
            st.integers(0, 3),
            st.sampled_from([0, 13, 30]),
            st.integers(1, OUTPUT),
            st.integers(0, 3),
        ),
        min_size=2,
        max_size=9,
    ),
)
def test_greedy_tokens_do_not_depend_on_the_schedule(
    folder: Path,
    name: str,
    knobs: dict[str, Any],
    spare: int,
    picks: list[tuple[int, int, int, int]],
) -> None:
    """Chunks longer than the window, prefix hits, preemptions, caches of the least size."""
    tiny, llm = loaded(folder, name)
    size = knobs["block_size"]
    least = most_owned_blocks(MODELS[name][2], -(-LONGEST // size), size)
    llm.reconfigure(**knobs, kv_cache_memory_bytes=bytes_for(llm, least + spare, size))
    assert llm.engine.pool.num_blocks == least + spare
    stems = random_prompts(9, [8, 17, 30, 40])
    jobs = [
        (stems[stem] + stems[(stem + 3) % 4][:cut], length, priority)
        for stem, cut, length, priority in picks
    ]
    for (prompt, length, _), tokens in zip(jobs, serve(llm, jobs), strict=True):
        assert len(tokens) == length
        assert_tokens(name, tiny, prompt, tokens)


ROOMY: dict[str, Any] = {
    "block_size": 8,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "long_prefill_token_threshold": 0,
    "enable_prefix_caching": True,
    "scheduling_policy": "fcfs",
    "batching_mode": "continuous",
}


@pytest.mark.parametrize("name", MODELS)
def test_what_lies_before_the_window_is_given_up(folder: Path, name: str) -> None:
    tiny, llm = loaded(folder, name)
    llm.reconfigure(**ROOMY, kv_cache_memory_bytes=bytes_for(llm, 60, 8))
    records: list[StepRecord] = []
    llm.engine.on_step = records.append
    (prompt,) = random_prompts(11, [56])
    (tokens,) = serve(llm, [(prompt, OUTPUT, 0)])
    llm.engine.on_step = None
    windows = MODELS[name][2]
    assert records[0].prefill_tokens == 56  # a chunk of several windows: all of it is there
    assert records[0].blocks_used == 7 * len(windows)
    # 9 tokens lie in two blocks, or at the end of a block in three for a moment.
    full = windows.count(0)
    for record in records[1:]:
        assert record.blocks_used <= 10 * full + 2 * (len(windows) - full)
    assert assert_tokens(name, tiny, prompt, tokens) > 8


@pytest.mark.parametrize("name", MODELS)
def test_a_prefix_whose_beginning_is_gone_is_found(folder: Path, name: str) -> None:
    tiny, llm = loaded(folder, name)
    llm.reconfigure(**ROOMY, kv_cache_memory_bytes=bytes_for(llm, 60, 8))
    llm.engine.clear_prefix_cache()
    first, tail = random_prompts(31, [40, 9])
    serve(llm, [(first, 1, 0)])
    hits = llm.engine.pool.hit_tokens
    prompt = first + tail
    (tokens,) = serve(llm, [(prompt, OUTPUT, 0)])
    assert llm.engine.pool.hit_tokens - hits == 40
    assert assert_tokens(name, tiny, prompt, tokens) > 8


@pytest.mark.parametrize("name", MODELS)
def test_a_tiny_cache_preempts_and_stays_exact(folder: Path, name: str) -> None:
    tiny, llm = loaded(folder, name)
    blocks = most_owned_blocks(MODELS[name][2], LONGEST // 8, 8)
    llm.reconfigure(
        **{**ROOMY, "enable_prefix_caching": False},
        kv_cache_memory_bytes=bytes_for(llm, blocks, 8),
    )
    records: list[StepRecord] = []
    llm.engine.on_step = records.append
    prompts = random_prompts(21, [16, 18, 20, 22, 40])
    outputs = serve(llm, [(prompt, OUTPUT, 0) for prompt in prompts])
    llm.engine.on_step = None
    if 0 in MODELS[name][2]:  # windows alone grow no more once they are full
        assert sum(record.preemptions for record in records) > 0
    for prompt, tokens in zip(prompts, outputs, strict=True):
        assert_tokens(name, tiny, prompt, tokens)


def test_a_window_as_long_as_the_longest_sequence_is_none(folder: Path) -> None:
    tiny, _ = loaded(folder, "alternating")
    llm = tiny.llm(max_model_len=9)
    assert llm.engine.pool.windows == (0,)
    llm.reconfigure(max_model_len=10)
    assert llm.engine.pool.windows == (0, 9, 9)
