import itertools
import threading
import tracemalloc

import pytest

from engine.batch import BatchResult
from engine.config import EngineConfig
from engine.engine import CacheShape, Engine
from engine.errors import ConfigError, EngineError, EnvironmentLacks, RequestRefused
from engine.output import RequestOutput
from engine.request import FinishReason, TokenLogprobs
from engine.step_record import StepRecord
from tests.engine.fake_detokenizer import FakeDetokenizer, as_text
from tests.engine.fake_executor import (
    FakeExecutor,
    VirtualClock,
    assert_idle,
    expected_output,
    greedy,
    make_engine,
    run,
)


def tokens_of(outputs: list[RequestOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def text_of(outputs: list[RequestOutput]) -> str:
    return "".join(output.text for output in outputs)


def text_engine(**knobs: object) -> tuple[Engine, FakeDetokenizer]:
    config = EngineConfig.from_mapping({"block_size": 8, **knobs})
    clock = VirtualClock()
    executor = FakeExecutor(64, 8, clock)
    detokenizer = FakeDetokenizer()
    engine = Engine(
        config,
        executor,
        CacheShape(64, 256),
        clock=clock,
        detokenizer=detokenizer,
    )
    return engine, detokenizer


# In and out


def test_outputs_stream_each_token_once_and_end_with_the_reason() -> None:
    engine, _ = make_engine()
    prompt = [1, 2, 3]
    request = engine.add("a", prompt, greedy(5))
    outputs = run(engine)["a"]
    assert [len(o.token_ids) for o in outputs] == [1] * 5
    assert tokens_of(outputs) == request.output_token_ids == expected_output(prompt, 5)
    assert [o.finish_reason for o in outputs] == [None] * 4 + [FinishReason.LENGTH]
    assert prompt == [1, 2, 3]
    assert_idle(engine)


def test_a_refused_request_leaves_once_with_its_reason() -> None:
    engine, executor = make_engine()
    engine.add("bad", [99])
    outputs = engine.step()
    assert [(o.request_id, o.finish_reason) for o in outputs] == [("bad", FinishReason.REFUSED)]
    assert outputs[0].refusal is not None
    assert "token id 99" in outputs[0].refusal
    assert engine.step() == []
    assert executor.batches == []
    assert_idle(engine)


def test_an_id_in_use_cannot_be_added_again_until_it_left() -> None:
    engine, _ = make_engine()
    engine.add("a", [1], greedy(2))
    with pytest.raises(RequestRefused, match="'a' is in use"):
        engine.add("a", [2])
    run(engine)
    engine.add("a", [2], greedy(2))
    assert tokens_of(run(engine)["a"]) == expected_output([2], 2)


def test_abort_reaches_waiting_and_running_requests_and_ignores_others() -> None:
    engine, _ = make_engine(max_num_seqs=1)
    engine.add("runs", [1], greedy(50))
    engine.add("waits", [2], greedy(50))
    engine.step()
    for name in ("runs", "waits", "never added", "runs"):
        engine.abort(name)
    outputs = engine.step()
    assert {o.request_id: o.finish_reason for o in outputs} == {
        "runs": FinishReason.ABORT,
        "waits": FinishReason.ABORT,
    }
    assert len(outputs) == 2
    assert_idle(engine)


def test_abort_before_the_first_step_takes_effect() -> None:
    engine, executor = make_engine()
    engine.add("a", [1], greedy(50))
    engine.abort("a")
    assert [o.finish_reason for o in engine.step()] == [FinishReason.ABORT]
    assert executor.batches == []
    assert_idle(engine)


def test_abort_all_ends_everything() -> None:
    engine, _ = make_engine(max_num_seqs=2)
    for i in range(5):
        engine.add(f"r{i}", [i], greedy(50))
    engine.step()
    engine.add("late", [7])
    engine.abort_all()
    assert sorted(o.request_id for o in engine.step()) == ["late", *(f"r{i}" for i in range(5))]
    assert_idle(engine)


def test_waiting_for_a_full_batch_computes_nothing_and_tells_when_to_return() -> None:
    engine, executor = make_engine(batching_mode="dynamic", max_queue_delay=2.0, max_num_seqs=4)
    assert engine.next_wakeup() is None
    engine.add("a", [1], greedy(2), arrival=0.5)
    assert engine.step() == []
    assert engine.next_wakeup() == 2.5
    assert tokens_of(run(engine)["a"]) == expected_output([1], 2)
    clock = engine.clock
    assert isinstance(clock, VirtualClock)
    assert clock.now > 2.5
    assert len(executor.batches) == 2


def test_threads_may_add_and_abort_while_another_steps() -> None:
    engine, executor = make_engine(max_num_seqs=16)
    executor.clock = None
    added: list[str] = []

    def submit(name: str) -> None:
        for i in range(150):
            request_id = f"{name}{i}"
            engine.add(request_id, [i % 50, 3], greedy(4))
            added.append(request_id)
            if i % 10 == 0:
                engine.abort(request_id)

    threads = [threading.Thread(target=submit, args=(name,)) for name in "abc"]
    left: list[RequestOutput] = []
    for thread in threads:
        thread.start()
    while any(t.is_alive() for t in threads) or engine.has_unfinished:
        left += [o for o in engine.step() if o.finish_reason is not None]
    for thread in threads:
        thread.join()
    assert sorted(o.request_id for o in left) == sorted(added)
    assert len(added) == 450
    for output in left:
        request = output.request
        if output.finish_reason is FinishReason.LENGTH:
            assert request.output_token_ids == expected_output(request.token_ids[:2], 4)
    assert_idle(engine)


# Text


def test_text_is_complete_whatever_the_reason() -> None:
    engine, detokenizer = text_engine()
    engine.add("a", [1], greedy(9))
    assert text_of(run(engine)["a"]) == as_text(expected_output([1], 9))
    assert (detokenizer.open, detokenizer.finished) == ({}, 1)


@pytest.mark.parametrize("tokens_per_step", [1, 4])
@pytest.mark.parametrize("min_tokens", [0, 6])
def test_a_stop_text_ends_the_output_before_it(tokens_per_step: int, min_tokens: int) -> None:
    output = expected_output([1], 12)
    stop = as_text(output)[7:11]  # begins in the fourth token and ends in the sixth
    assert as_text(output).find(stop) == 7
    engine, detokenizer = text_engine()
    assert isinstance(engine.executor, FakeExecutor)
    engine.executor.tokens_per_step = tokens_per_step
    request = engine.add("a", [1], greedy(12, stop=[stop], min_tokens=min_tokens))
    outputs = run(engine)["a"]
    assert text_of(outputs) == as_text(output)[:7]
    assert tokens_of(outputs) == request.output_token_ids == output[:6]
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert detokenizer.open == {}
    assert_idle(engine)


def test_a_stop_text_does_not_count_before_min_tokens() -> None:
    output = expected_output([1], 12)
    stop = as_text(output)[7:11]
    engine, _ = text_engine()
    engine.add("a", [1], greedy(12, stop=[stop], min_tokens=7))
    assert tokens_of(run(engine)["a"]) == output


def test_a_stop_text_wins_over_the_length_limit_at_the_same_token() -> None:
    output = expected_output([1], 6)
    engine, _ = text_engine()
    request = engine.add("a", [1], greedy(6, stop=[as_text(output)[7:11]]))
    run(engine)
    assert request.finish_reason is FinishReason.STOP


def test_the_stop_token_is_an_output_token_but_no_text() -> None:
    output = expected_output([1], 12)
    engine, _ = text_engine()
    last = output[3]
    assert last not in output[:3]
    engine.add("a", [1], greedy(12, stop_token_ids=[last]))
    outputs = run(engine)["a"]
    assert tokens_of(outputs) == output[:4]
    assert text_of(outputs) == as_text(output[:3])


def test_aborting_hands_out_the_text_held_back() -> None:
    engine, detokenizer = text_engine()
    engine.add("a", [1], greedy(50, stop=["zzzzzzz"]))
    outputs = [*engine.step(), *engine.step()]
    engine.abort("a")
    outputs += engine.step()
    assert text_of(outputs) == as_text(expected_output([1], 2))
    assert detokenizer.open == {}


def test_stop_texts_without_a_tokenizer_are_refused() -> None:
    engine, _ = make_engine()
    engine.add("a", [1], greedy(5, stop=["x"]))
    (output,) = engine.step()
    assert output.finish_reason is FinishReason.REFUSED
    assert output.refusal == "stop texts need a tokenizer, and this engine has none"
    assert_idle(engine)


def test_logprobs_stand_beside_the_tokens_kept() -> None:
    class WithLogprobs(FakeExecutor):
        def execute(self, batch):  # type: ignore[no-untyped-def]
            result = super().execute(batch)
            result.logprobs = [[TokenLogprobs(t, -1.0, {}) for t in ts] for ts in result.tokens]
            return result

    config = EngineConfig(block_size=8)
    executor = WithLogprobs(64, 8)
    executor.tokens_per_step = 4
    engine = Engine(config, executor, CacheShape(64, 256))
    engine.add("a", [1], greedy(6, logprobs=0))
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    for output in outputs:
        assert output.logprobs is not None
        assert [p.token_id for p in output.logprobs] == output.token_ids
    assert tokens_of(outputs) == expected_output([1], 6)


# Faults


def test_an_executor_that_fails_costs_its_batch_and_nothing_else() -> None:
    engine, executor = make_engine(max_num_seqs=2)
    for name in ("a", "b", "c"):
        engine.add(name, [1, 2], greedy(4))
    engine.step()
    executor.fail_next = MemoryError("no room")
    with pytest.raises(MemoryError, match="no room"):
        engine.step()
    engine.scheduler.check_integrity()
    outputs = run(engine)
    for name in ("a", "b"):
        assert [o.finish_reason for o in outputs[name]] == [FinishReason.ABORT]
        assert outputs[name][0].refusal == "the step that computed it failed: MemoryError: no room"
    assert tokens_of(outputs["c"]) == expected_output([1, 2], 4)
    assert_idle(engine)


def test_an_interrupt_loses_nothing() -> None:
    engine, executor = make_engine()
    engine.add("a", [1, 2], greedy(4))
    engine.step()
    executor.fail_next = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert tokens_of(run(engine)["a"]) == expected_output([1, 2], 4)[1:]
    assert_idle(engine)


@pytest.mark.parametrize("tokens", [[], [[1]], [[], [1]], [[1], [2], [3]]])
def test_an_answer_that_does_not_fit_the_batch_is_a_fault(tokens: list[list[int]]) -> None:
    class Wrong:
        def execute(self, batch):  # type: ignore[no-untyped-def]
            return BatchResult(tokens, 0.0)

    engine = Engine(EngineConfig(block_size=8), Wrong(), CacheShape(64, 256))
    engine.add("a", [1], greedy(2))
    engine.add("b", [1], greedy(2))
    with pytest.raises(EngineError, match="the executor returned"):
        engine.step()
    assert [o.finish_reason for o in engine.step()] == [FinishReason.ABORT] * 2
    assert_idle(engine)


# Reconfiguring


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


# Evidence


def test_step_records_say_what_each_step_did() -> None:
    records: list[StepRecord] = []
    engine, _ = make_engine(num_blocks=20, max_num_seqs=2, max_num_batched_tokens=24)
    engine.on_step = records.append
    engine.add("a", [1] * 20, greedy(3))
    engine.add("b", [1] * 17 + [2], greedy(3))
    engine.add("c", [3], greedy(1))
    run(engine)
    first, second = records[:2]
    assert (first.prefill_tokens, first.prefill_sequences, first.decode_sequences) == (24, 2, 0)
    assert (first.kv_tokens_read, first.queue_length, first.running) == (24, 1, 2)
    assert (first.blocks_used, first.blocks_cached, first.blocks_total) == (6, 0, 20)
    assert (second.prefill_tokens, second.prefill_sequences, second.decode_sequences) == (14, 1, 1)
    assert second.kv_tokens_read == 21 + 18
    assert first.device_seconds == pytest.approx(0.001 + 24e-5)
    assert sum(r.prefill_tokens for r in records) == 20 + 18 + 1
    assert sum(r.decode_sequences for r in records) == 2 + 2
    for earlier, later in itertools.pairwise(records):
        assert later.start >= earlier.start + earlier.device_seconds - 1e-9
    assert all(r.host_seconds >= 0 and r.scheduler_seconds >= 0 for r in records)


def test_step_records_count_preemptions_and_prefix_hits() -> None:
    records: list[StepRecord] = []
    engine, _ = make_engine(num_blocks=6)
    engine.on_step = records.append
    requests = [engine.add(f"r{i}", [i] * 16, greedy(20)) for i in range(2)]
    run(engine)
    assert sum(r.preemptions for r in records) == sum(r.num_preemptions for r in requests) > 0
    assert sum(r.prefix_hit_tokens for r in records) == engine.pool.hit_tokens > 0


def test_ten_thousand_requests_leave_no_memory_behind() -> None:
    engine, executor = make_engine(num_blocks=200, max_num_seqs=64)
    executor.keep_batches = False

    def serve(first: int, count: int) -> None:
        for i in range(first, first + count):
            prompt = [i % 50, i // 50 % 50, i // 2500 % 50] + [i % 7] * 7
            engine.add(f"r{i}", prompt, greedy(3), priority=i % 3)
            if i % 11 == 0:
                engine.abort(f"r{i}")
            if i % 13 == 0:
                engine.add(f"x{i}", [])
            if i % 16 == 0:
                engine.step()
        while engine.has_unfinished:
            engine.step()

    serve(0, 2000)  # the cache is full of other prompts' blocks from here on
    assert engine.pool.evictions > 0
    tracemalloc.start()
    try:
        serve(2000, 1000)
        before, _ = tracemalloc.get_traced_memory()
        serve(3000, 7000)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert_idle(engine)
    # A single leaked integer a request would be more.
    assert after - before < 7000 * 8
