import itertools
import threading
import tracemalloc

import pytest

from engine.batch import BatchResult
from engine.config import EngineConfig
from engine.engine import CacheShape, Engine
from engine.errors import EngineError, RequestRefused
from engine.output import RequestOutput
from engine.request import FinishReason
from engine.step_record import StepRecord
from tests.engine.fake_executor import (
    VirtualClock,
    assert_idle,
    expected_output,
    greedy,
    make_engine,
    run,
    tokens_of,
)

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
