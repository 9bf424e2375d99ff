import gc
import sys
import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.load import LoadProgress, LoadResult, run_load
from autotune.workload.materialise import LoadRequest
from engine.batch import Batch, BatchResult
from engine.config import EngineConfig
from engine.engine import CacheShape, Engine
from engine.output import RequestOutput
from engine.request import Request, SamplingParams
from engine.step_record import StepRecord


class SleepingExecutor:
    """Answers token 1 after a fixed time; may fail at one step."""

    def __init__(self, seconds: float = 0.001, fail_at: int | None = None) -> None:
        self.seconds = seconds
        self.fail_at = fail_at
        self.executed = 0

    def execute(self, batch: Batch) -> BatchResult:
        self.executed += 1
        if self.executed == self.fail_at:
            raise MemoryError("no more")
        time.sleep(self.seconds)
        return BatchResult(
            [[1] if sequence.samples else [] for sequence in batch.sequences], self.seconds
        )


def make_engine(
    executor: SleepingExecutor | None = None, blocks: int = 200, **knobs: object
) -> Engine:
    config = EngineConfig(block_size=16, **{"max_num_seqs": 64, **knobs})  # type: ignore[arg-type]
    return Engine(config, executor or SleepingExecutor(), CacheShape(blocks, 512))


def make_requests(
    arrivals: Sequence[float], inputs: int = 8, outputs: int = 4
) -> list[LoadRequest]:
    return [
        LoadRequest(f"r{i}", arrival, tuple(range(100 * i, 100 * i + inputs)), outputs)
        for i, arrival in enumerate(arrivals)
    ]


def check_invariants(result: LoadResult, requests: Sequence[LoadRequest]) -> None:
    """Every request sent has one record, and in each time only goes on."""
    ids = [record.request_id for record in result.records]
    assert len(set(ids)) == len(ids)
    assert set(ids) <= {request.request_id for request in requests}
    for record in result.records:
        events = [record.intended_send, record.send, *record.token_times]
        assert all(a <= b for a, b in pairwise(events)), record
        assert events[-1] <= result.duration + 1e-9 or not record.token_times
        assert record.output_tokens == len(record.token_times)
        if record.outcome == "finished":
            assert record.output_tokens == record.asked_output_tokens
            assert record.reason is None
        else:
            assert record.reason
    assert all(a.start <= b.start for a, b in pairwise(result.steps))


def test_a_load_is_sent_at_its_times_and_answered() -> None:
    requests = make_requests([0.0, 0.05, 0.06, 0.12, 0.3])
    engine = make_engine()
    seen: list[LoadProgress] = []
    result = run_load(engine, list(reversed(requests)), on_progress=seen.append)
    check_invariants(result, requests)
    assert [record.request_id for record in result.records] == ["r0", "r1", "r2", "r3", "r4"]
    assert [record.intended_send for record in result.records] == [0.0, 0.05, 0.06, 0.12, 0.3]
    assert {record.outcome for record in result.records} == {"finished"}
    assert [record.input_tokens for record in result.records] == [8] * 5
    assert result.duration >= 0.3
    assert len(result.steps) == engine.executor.executed  # type: ignore[attr-defined]
    assert sum(step.prefill_tokens for step in result.steps) == 40
    assert not engine.has_unfinished
    assert engine.pool.num_used == 0
    assert seen
    assert all(0 <= p.left <= p.total == 5 for p in seen)
    assert not result.interrupted


def test_sends_do_not_wait_for_answers() -> None:
    # One sequence at a time, 20 steps of 5 ms each: the last of 10 waits long, and is sent early.
    requests = make_requests([0.001 * i for i in range(10)], outputs=20)
    engine = make_engine(SleepingExecutor(0.005), max_num_seqs=1)
    result = run_load(engine, requests)
    check_invariants(result, requests)
    last = result.records[-1]
    first_done = result.records[0].token_times[-1]
    assert last.send < first_done
    assert last.ttft is not None
    assert last.ttft > 9 * 20 * 0.005 * 0.9


def test_ttft_counts_from_the_intended_send() -> None:
    class LateEngine(Engine):
        def add(self, *args: object, **kwargs: object) -> Request:
            time.sleep(0.06)
            return super().add(*args, **kwargs)  # type: ignore[arg-type]

    executor = SleepingExecutor()
    engine = LateEngine(EngineConfig(max_num_seqs=8), executor, CacheShape(200, 512))
    requests = make_requests([0.0] * 6)
    result = run_load(engine, requests)
    check_invariants(result, requests)
    assert not result.delivered
    assert result.note is not None
    assert "not delivered as asked" in result.note
    last = result.records[-1]
    assert last.send - last.intended_send > 0.25
    assert last.ttft is not None
    assert last.ttft >= last.send - last.intended_send + 0.06


def test_what_can_never_fit_is_refused_with_its_reason() -> None:
    requests = [*make_requests([0.0, 0.02]), LoadRequest("big", 0.01, tuple(range(600)), 4)]
    result = run_load(make_engine(), requests)
    check_invariants(result, requests)
    (big,) = [record for record in result.records if record.request_id == "big"]
    assert big.outcome == "refused"
    assert big.token_times == ()
    assert sum(record.completed for record in result.records) == 2


def test_unfinished_requests_time_out_after_the_drain() -> None:
    requests = make_requests([0.0, 0.05], outputs=400)
    engine = make_engine(SleepingExecutor(0.01))
    result = run_load(engine, requests, drain_limit=0.4)
    check_invariants(result, requests)
    assert {record.outcome for record in result.records} == {"timed_out"}
    assert result.records[0].reason == "not finished 0.4 s after the last arrival"
    assert 0.45 <= result.duration < 3.0
    assert all(record.output_tokens > 0 for record in result.records)
    assert not engine.has_unfinished
    assert engine.pool.num_used == 0


def test_the_time_limit_ends_the_sending_and_is_said() -> None:
    requests = make_requests([0.0, 0.05, 5.0, 6.0])
    result = run_load(make_engine(), requests, time_limit=0.1)
    check_invariants(result, requests)
    assert [record.request_id for record in result.records] == ["r0", "r1"]
    assert not result.delivered
    assert result.note == "2 of 4 requests were not sent: the time limit was reached"
    assert result.duration < 4.0


def test_stop_keeps_what_was_measured() -> None:
    stop = threading.Event()
    requests = make_requests([0.0, 0.01, 0.02, 60.0], outputs=5)
    requests.append(LoadRequest("long", 0.0, (1, 2), 400))
    timer = threading.Timer(1.0, stop.set)
    timer.start()
    engine = make_engine(SleepingExecutor(0.005))
    began = time.perf_counter()
    result = run_load(engine, requests, stop=stop)
    timer.join()
    assert time.perf_counter() - began < 10
    check_invariants(result, requests)
    assert result.interrupted
    outcome = {record.request_id: record.outcome for record in result.records}
    assert outcome == {
        "r0": "finished",
        "r1": "finished",
        "r2": "finished",
        "long": "failed",
    }
    assert "1 of 5 requests were not sent: the load was interrupted" in (result.note or "")
    assert engine.pool.num_used == 0
    assert not engine.has_unfinished


def test_ctrl_c_keeps_what_was_measured() -> None:
    engine = make_engine()
    step, count = engine.step, 0

    def interrupted_step() -> list[RequestOutput]:
        nonlocal count
        count += 1
        if count == 8:
            raise KeyboardInterrupt
        return step()

    engine.step = interrupted_step  # type: ignore[method-assign]
    requests = [*make_requests([0.0]), LoadRequest("later", 0.0, (3, 4), 100)]
    result = run_load(engine, requests)
    check_invariants(result, requests)
    assert result.interrupted
    assert {r.request_id: r.outcome for r in result.records} == {
        "r0": "finished",
        "later": "failed",
    }


def test_ctrl_c_within_a_step_leaves_the_engine_empty() -> None:
    class Interrupted(SleepingExecutor):
        def execute(self, batch: Batch) -> BatchResult:
            if self.executed == 4:
                self.executed += 1
                raise KeyboardInterrupt
            return super().execute(batch)

    engine = make_engine(Interrupted())
    requests = make_requests([0.0, 0.0, 0.0, 30.0], inputs=40, outputs=50)
    result = run_load(engine, requests)
    check_invariants(result, requests)
    assert result.interrupted
    assert [record.outcome for record in result.records] == ["failed"] * len(result.records)
    assert 1 <= len(result.records) <= 3
    assert not engine.has_unfinished
    assert engine.pool.num_used == 0


def _threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def test_a_failing_step_is_raised_and_leaves_everything_as_it_was() -> None:
    calls: list[StepRecord] = []
    engine = make_engine(SleepingExecutor(fail_at=3))
    engine.on_step = calls.append
    before = engine.on_step
    interval = sys.getswitchinterval()
    with pytest.raises(MemoryError, match="no more"):
        run_load(engine, make_requests([0.0, 0.0, 60.0], outputs=9))
    assert engine.on_step == before
    assert gc.isenabled()
    assert sys.getswitchinterval() == interval
    assert not engine.has_unfinished
    assert engine.pool.num_used == 0
    assert "load-sender" not in _threads()


def test_collections_are_held_off_only_during_the_load() -> None:
    enabled: list[bool] = []

    class Watching(SleepingExecutor):
        def execute(self, batch: Batch) -> BatchResult:
            enabled.append(gc.isenabled())
            return super().execute(batch)

    run_load(make_engine(Watching()), make_requests([0.0]))
    assert set(enabled) == {False}
    assert gc.isenabled()
    gc.disable()
    try:
        run_load(make_engine(), make_requests([0.0]))
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_an_idle_engine_is_not_stepped_and_the_loop_sleeps() -> None:
    engine = make_engine()
    step: Callable[[], list[RequestOutput]] = engine.step
    calls = 0

    def counted() -> list[RequestOutput]:
        nonlocal calls
        calls += 1
        return step()

    engine.step = counted  # type: ignore[method-assign]
    requests = make_requests([0.0, 2.0], outputs=2)
    processor = time.thread_time()
    result = run_load(engine, requests)
    processor = time.thread_time() - processor
    assert calls <= 6
    assert processor < 1.5  # a spinning loop would take both seconds
    # Woken by the send, not by the poll: far less than POLL_S on a quiet machine.
    assert all(record.completed for record in result.records)


def test_dynamic_batching_sleeps_until_its_delay_is_over() -> None:
    engine = make_engine(batching_mode="dynamic", max_queue_delay=0.1)
    requests = make_requests([0.0, 0.02], outputs=2)
    result = run_load(engine, requests)
    check_invariants(result, requests)
    assert result.records[0].ttft is not None
    assert result.records[0].ttft >= 0.1
    assert all(record.completed for record in result.records)


def test_lengths_are_forced_and_sampling_kept() -> None:
    seen: list[SamplingParams] = []
    arrivals: list[float] = []
    engine = make_engine()
    add = engine.add

    def watched(*args: object, **kwargs: object) -> Request:
        request = add(*args, **kwargs)  # type: ignore[arg-type]
        seen.append(request.sampling)
        arrivals.append(request.arrival)
        return request

    engine.add = watched  # type: ignore[method-assign]
    sampling = SamplingParams(temperature=0.7, top_k=5, max_tokens=3, min_tokens=2, stop=("x",))
    requests = [LoadRequest("a", 0.0, (1,), 7), LoadRequest("b", 0.03, (2,), 1)]
    result = run_load(engine, requests, sampling=sampling)
    check_invariants(result, requests)
    assert [s.max_tokens for s in seen] == [7, 1]
    assert all(s.ignore_eos and s.temperature == 0.7 and s.top_k == 5 for s in seen)
    assert [record.output_tokens for record in result.records] == [7, 1]
    # The engine's queue counts from the intended send too.
    assert arrivals[1] - arrivals[0] == pytest.approx(0.03, abs=1e-9)


def test_cached_tokens_and_preemptions_are_recorded() -> None:
    prompt = tuple(range(64))
    requests = [LoadRequest("a", 0.0, prompt, 2), LoadRequest("b", 0.2, (*prompt, 9), 2, "s")]
    result = run_load(make_engine(), requests)
    assert [record.cached_tokens for record in result.records] == [0, 64]
    assert result.records[1].session_id == "s"
    # Three sequences that grow to 5 blocks each do not fit in 9.
    crowded = make_requests([0.0, 0.0, 0.0], inputs=16, outputs=60)
    result = run_load(make_engine(blocks=9), crowded)
    check_invariants(result, crowded)
    assert all(record.completed for record in result.records)
    assert sum(record.preemptions for record in result.records) > 0
    assert sum(record.preemptions for record in result.records) == sum(
        step.preemptions for step in result.steps
    )


def test_an_empty_load_and_equal_ids() -> None:
    result = run_load(make_engine(), [])
    assert (result.records, result.delivered, result.interrupted) == ([], True, False)
    twice = [LoadRequest("a", 0.0, (1,), 1)] * 2
    with pytest.raises(ValueError, match="must differ"):
        run_load(make_engine(), twice)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 0.1), st.integers(1, 200), st.integers(1, 60)),
        min_size=1,
        max_size=12,
    ),
    st.integers(6, 40),
    st.sampled_from(["fcfs", "sjf"]),
    st.sampled_from([0.01, 5.0]),
)
def test_every_request_leaves_once_whatever_the_load(
    shapes: list[tuple[float, int, int]], blocks: int, policy: str, drain: float
) -> None:
    requests = [
        LoadRequest(f"r{i}", arrival, tuple(range(i, i + inputs)), outputs)
        for i, (arrival, inputs, outputs) in enumerate(shapes)
    ]
    engine = make_engine(SleepingExecutor(0.0002), blocks=blocks, scheduling_policy=policy)
    result = run_load(engine, requests, drain_limit=drain)
    check_invariants(result, requests)
    assert len(result.records) == len(requests)
    assert engine.pool.num_used == 0
    for record, (_, inputs, outputs) in zip(
        result.records, sorted(shapes, key=lambda shape: shape[0]), strict=True
    ):
        fits = -(-(inputs + outputs - 1) // 16) <= blocks
        if not fits:
            assert record.outcome != "finished"
        elif drain > 1:
            assert record.outcome in ("finished", "refused")
