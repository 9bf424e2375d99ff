import pytest

from engine.config import EngineConfig
from engine.engine import CacheShape, Engine
from engine.errors import ConfigError, EnvironmentLacks
from engine.request import FinishReason
from tests.engine.fake_executor import (
    FakeExecutor,
    assert_idle,
    expected_output,
    greedy,
    make_engine,
    run,
    tokens_of,
)


def test_live_knobs_take_effect_on_the_next_step() -> None:
    engine, executor = make_engine()
    for i in range(6):
        engine.add(f"r{i}", [i, 1], greedy(6))
    engine.step()
    before = [len(batch) for batch in executor.batches]
    assert engine.reconfigure(max_num_seqs=2).max_num_seqs == 2
    outputs = run(engine)
    assert before == [6]
    assert all(len(batch) <= 2 for batch in executor.batches[1:])
    for i in range(6):
        assert tokens_of(outputs[f"r{i}"]) == expected_output([i, 1], 6)[1:]


def test_rebuilding_the_cache_loses_no_request() -> None:
    engine, executor = make_engine(resize=lambda config: 40)
    prompts = {f"r{i}": [i] * 20 for i in range(6)}
    for name, prompt in prompts.items():
        engine.add(name, prompt, greedy(10))
    got = {name: [] for name in prompts}  # type: ignore[var-annotated]
    for _ in range(4):
        for output in engine.step():
            got[output.request_id] += output.token_ids
    engine.reconfigure(block_size=32, kv_cache_memory_bytes=1 << 20)
    assert (engine.pool.block_size, engine.pool.num_blocks, executor.block_size) == (32, 40, 32)
    for name, outputs in run(engine).items():
        assert got[name] + tokens_of(outputs) == expected_output(prompts[name], 10)
    assert_idle(engine)


def test_what_the_new_cache_can_never_hold_is_refused() -> None:
    engine, _ = make_engine(resize=lambda config: 5)
    engine.add("large", [1] * 30, greedy(20))
    engine.add("small", [2] * 10, greedy(20))
    engine.add("open", [3] * 10, greedy(None))
    engine.step()
    engine.reconfigure(kv_cache_memory_bytes=1)
    outputs = run(engine)
    assert [o.finish_reason for o in outputs["large"]] == [FinishReason.REFUSED]
    assert outputs["large"][0].refusal is not None
    assert "KV cache holds 40 tokens" in outputs["large"][0].refusal
    assert tokens_of(outputs["small"]) == expected_output([2] * 10, 20)[1:]
    assert tokens_of(outputs["open"]) == expected_output([3] * 10, 31)[1:]


def test_a_shorter_model_length_refuses_or_clips() -> None:
    engine, _ = make_engine()
    engine.add("long", [1] * 60, greedy(20))
    engine.add("short", [2] * 10, greedy(90))
    engine.step()
    engine.reconfigure(max_model_len=50)
    outputs = run(engine)
    assert outputs["long"][-1].refusal == (
        "the sequence of 61 tokens leaves no room for output within max_model_len=50; at most "
        "49 fit"
    )
    assert tokens_of(outputs["short"]) == expected_output([2] * 10, 40)[1:]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"quantization": "int8"}, "quantization cannot change in a loaded engine"),
        ({"model": "x", "dtype": "float32"}, "model, dtype cannot change"),
        ({"max_num_seqs": 0}, "max_num_seqs=0 must be at least 1"),
        ({"max_num_seqs": 9, "block_size": 7}, "block_size=7 is not one of"),
        ({"max_num_batched_tokens": 8}, "is below max_num_seqs"),
        ({"max_num_sequences": 8}, "unknown knob"),
    ],
)
def test_a_bad_change_changes_nothing(knobs: dict[str, object], message: str) -> None:
    engine, _ = make_engine()
    engine.add("a", [1], greedy(5))
    engine.step()
    before = engine.config
    pool = engine.pool
    with pytest.raises(ConfigError, match=message):
        engine.reconfigure(**knobs)
    assert engine.config == before
    assert engine.pool is pool
    assert len(engine.scheduler.running) == 1
    assert tokens_of(run(engine)["a"]) == expected_output([1], 5)[1:]


def test_a_failed_rebuild_keeps_the_old_cache_and_the_requests() -> None:
    applied: list[int] = []

    def fail(config: EngineConfig) -> CacheShape:
        executor.reshape(64, 8)  # contents are lost
        raise EnvironmentLacks("no memory for the KV cache")

    executor = FakeExecutor(64, 8)
    engine = Engine(
        EngineConfig(block_size=8),
        executor,
        CacheShape(64, 256),
        rebuild_cache=fail,
        apply_live=lambda config: applied.append(config.seed),
    )
    engine.add("a", [1] * 20, greedy(5))
    (first,) = engine.step()
    with pytest.raises(EnvironmentLacks):
        engine.reconfigure(block_size=16, seed=3)
    assert engine.config == EngineConfig(block_size=8)
    assert applied == [3, 0]
    tokens = list(first.token_ids)
    while engine.has_unfinished:
        for output in engine.step():
            tokens += output.token_ids
    assert tokens == expected_output([1] * 20, 5)
    assert_idle(engine)


def test_a_change_to_the_same_values_costs_nothing() -> None:
    engine, _ = make_engine()
    pool = engine.pool
    engine.reconfigure(block_size=8, max_num_seqs=256)
    assert engine.pool is pool


def test_an_engine_without_a_rebuild_hook_says_so() -> None:
    engine = Engine(EngineConfig(block_size=8), FakeExecutor(64, 8), CacheShape(64, 256))
    with pytest.raises(ConfigError, match="cannot rebuild its KV cache"):
        engine.reconfigure(block_size=16)


def test_larger_steps_than_the_cache_was_sized_beside_rebuild_it() -> None:
    engine, _ = make_engine(max_num_seqs=2, max_num_batched_tokens=16)
    engine._outgrown_by = lambda config: config.max_num_batched_tokens > 16
    engine.add("a", [1] * 12, greedy(6))
    engine.step()
    pool = engine.pool
    engine.reconfigure(max_num_seqs=4)
    assert engine.pool is pool
    engine.reconfigure(max_num_batched_tokens=32)
    assert engine.pool is not pool
    assert tokens_of(run(engine)["a"]) == expected_output([1] * 12, 6)[1:]
