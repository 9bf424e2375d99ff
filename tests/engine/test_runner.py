"""The runner's account of a step, its memory, and its live knobs."""

from __future__ import annotations

import time
import weakref
from typing import Any

import pytest
import torch

from engine.batch import Batch, BatchResult, ScheduledSequence
from engine.block_tables import BlockTables
from engine.config import EngineConfig
from engine.cpu_cache_budget import cpu_cache_budget
from engine.errors import EnvironmentLacks
from engine.kv_cache import kv_bytes_per_token, num_blocks_for
from engine.request import Request, SamplingParams
from engine.runner import ModelRunner
from tests.engine.tiny_llama import TinyLlama, make_tiny_llama


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    return make_tiny_llama(tmp_path_factory.mktemp("model"))


def runner_of(tiny: TinyLlama, **knobs: object) -> ModelRunner:
    runner = tiny.llm(**knobs).engine.executor
    assert isinstance(runner, ModelRunner)
    return runner


def sequence(tokens: int, samples: bool, logprobs: int | None = None) -> ScheduledSequence:
    sampling = SamplingParams(temperature=0.0, logprobs=logprobs)
    request = Request("r", list(range(tokens)), sampling, 0.0, tables=BlockTables([[0, 1]]))
    return ScheduledSequence(request, 0, tokens, samples)


def test_tokens_only_of_sequences_that_sample(tiny: TinyLlama) -> None:
    runner = runner_of(tiny, block_size=8)
    one, other = sequence(5, True, logprobs=1), sequence(6, False)
    other.request.request_id, other.request.tables = "s", BlockTables([[2]])
    result = runner.execute(Batch([one, other], 0))
    expected = int(tiny.logits(list(range(5)))[-1].argmax())
    assert result.tokens == [[expected], []]
    assert result.logprobs[0] is not None
    assert result.logprobs[1] is None
    assert runner.execute(Batch([sequence(7, False)], 0)).tokens == [[]]


def test_seconds_add_up_to_the_step(tiny: TinyLlama) -> None:
    runner = runner_of(tiny)
    batch = Batch([sequence(20, True)], 0)
    start = time.perf_counter()
    result = runner.execute(batch)
    elapsed = time.perf_counter() - start
    assert result.host_seconds > 0
    assert result.device_seconds > 0
    assert result.host_seconds + result.device_seconds <= elapsed


def test_kv_bytes_are_those_of_the_cache(tiny: TinyLlama) -> None:
    runner = runner_of(tiny, kv_cache_memory_bytes=100_000, block_size=8)
    spec, dtype = runner.decoder.spec, runner.decoder.dtype
    tokens = runner.num_blocks * 8
    assert runner.cache.nbytes == tokens * kv_bytes_per_token(spec, dtype)
    assert 100_000 - 8 * kv_bytes_per_token(spec, dtype) < runner.cache.nbytes <= 100_000


def test_no_more_blocks_than_could_be_used(tiny: TinyLlama) -> None:
    spec = runner_of(tiny).decoder.spec
    few = EngineConfig(block_size=16, max_num_seqs=4)
    many = EngineConfig(block_size=16, max_num_seqs=1000)
    assert num_blocks_for(few, spec, torch.float32, 40, 1 << 40) == 3 * 256
    assert num_blocks_for(many, spec, torch.float32, 40, 1 << 40) == 3 * 1000


def test_default_budget_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 10 << 30

    monkeypatch.setattr("psutil.virtual_memory", Memory)
    assert cpu_cache_budget() == 10 << 28
    Memory.available = 100 << 30
    assert cpu_cache_budget() == 4 << 30


def test_a_cache_that_does_not_fit_leaves_the_old_one(tiny: TinyLlama) -> None:
    llm = tiny.llm(block_size=8)
    before = llm.engine.pool.num_blocks
    with pytest.raises(EnvironmentLacks, match="kv_cache_memory_bytes"):
        llm.reconfigure(kv_cache_memory_bytes=10)
    assert llm.engine.pool.num_blocks == before
    assert llm.config.kv_cache_memory_bytes is None
    greedy = SamplingParams(temperature=0.0, max_tokens=5)
    assert llm.generate([[1, 2]], greedy)[0].outputs[0].token_ids == tiny.greedy([1, 2], 5)


@pytest.mark.parametrize("compiles", [False, True])
def test_kernels_of_another_cache_are_compiled_before_it_serves(
    tiny: TinyLlama, monkeypatch: pytest.MonkeyPatch, compiles: bool
) -> None:
    runner = runner_of(tiny)
    runner.compiles = compiles
    steps: list[tuple[int, int]] = []
    execute = runner.execute

    def noted(batch: Batch) -> BatchResult:
        steps.append((batch.num_tokens, runner.cache.block_size))
        return execute(batch)

    monkeypatch.setattr(runner, "execute", noted)
    changed = EngineConfig(num_threads=1, block_size=32, max_num_batched_tokens=16, max_num_seqs=4)
    runner.reconfigure(changed, 64)
    assert {size for _, size in steps} == ({32} if compiles else set())
    assert {1, 2, 8, 16} <= {tokens for tokens, _ in steps} or not compiles


def test_what_is_missing_is_told_where_nothing_is_left_for_the_cache(tiny: TinyLlama) -> None:
    spec = tiny.llm()._loaded.spec
    with pytest.raises(EnvironmentLacks) as told:
        num_blocks_for(EngineConfig(), spec, torch.float32, 40, -(300 << 20))
    text = str(told.value)
    assert "gpu_memory_utilization=0.9 is 300.0 MiB less than" in text
    assert "raise kv_cache_memory_bytes" not in text


def test_threads_are_live(tiny: TinyLlama) -> None:
    before = torch.get_num_threads()
    llm = tiny.llm()
    assert torch.get_num_threads() == 1
    try:
        llm.reconfigure(num_threads=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_seed_is_live(tiny: TinyLlama) -> None:
    runner = runner_of(tiny)
    config = EngineConfig(seed=5, num_threads=1)
    runner.apply_live(config)
    assert runner._sampler.seed == 5


def test_memory_of_the_attempt_is_free_when_the_old_cache_is_built_again(
    tiny: TinyLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = runner_of(tiny)
    allocate = runner.forward.allocate
    attempts: list[weakref.ref[torch.Tensor]] = []

    def full(*arguments: Any) -> None:
        if attempts:
            assert attempts[0]() is None
            return allocate(*arguments)
        activations = torch.zeros(3)
        attempts.append(weakref.ref(activations))
        try:
            raise torch.OutOfMemoryError("fake")
        except torch.OutOfMemoryError as error:
            raise EnvironmentLacks("no room") from error

    monkeypatch.setattr(runner.forward, "allocate", full)
    with pytest.raises(EnvironmentLacks, match="no room"):
        runner.reconfigure(EngineConfig(num_threads=1, block_size=32), 64)
    assert len(attempts) == 1
    assert runner.cache.block_size == 16
