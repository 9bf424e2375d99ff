"""An engine whose executor need not be waited for serves as one whose executor waits itself."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.attention_work import AttentionWork
from engine.batch import Batch, BatchResult
from engine.config import EngineConfig
from engine.engine import CacheShape, Engine
from engine.launched_step import LaunchedStep
from engine.loading import load_model
from engine.request import FinishReason, SamplingParams
from engine.step_record import StepRecord
from tests.engine.fake_detokenizer import FakeDetokenizer, as_text
from tests.engine.fake_executor import (
    FakeExecutor,
    VirtualClock,
    as_packed,
    assert_idle,
    expected_output,
    greedy,
    make_engine,
    run,
    text_of,
    tokens_of,
)
from tests.engine.tiny_llama import make_tiny_llama


def test_steps_and_outputs_are_the_same() -> None:
    """Also where stop texts, preemption and prefix hits decide on what is scheduled next."""
    served = []
    for pipelined in (False, True):
        executor = FakeExecutor(10, 8, VirtualClock())
        executor.pipelined = pipelined
        engine = Engine(
            EngineConfig(block_size=8, max_num_seqs=3, max_num_batched_tokens=16),
            executor,
            CacheShape(10, 70),
            clock=executor.clock or time.perf_counter,
            detokenizer=FakeDetokenizer(),
        )
        for i in range(9):
            stop = as_text(expected_output([i] * 9, 30))[21:25] if i % 3 else ()
            sampling = SamplingParams(temperature=0.0, max_tokens=30, stop=stop)
            engine.add(str(i), [i] * 9, sampling, arrival=0.0)
        outputs = run(engine)
        assert_idle(engine)
        served.append(
            (
                executor.batches,
                {
                    name: (tokens_of(o), text_of(o), o[-1].finish_reason)
                    for name, o in outputs.items()
                },
                sum(o[-1].request.num_preemptions for o in outputs.values()),
            )
        )
    assert served[0] == served[1]
    assert served[0][2] > 0


def test_the_next_step_is_launched_before_outputs_are_handed_out() -> None:
    engine, executor = make_engine(pipelined=True)
    engine.add("a", [1, 2], greedy(3))
    assert engine.step() == []
    assert engine.next_wakeup() == engine.clock()
    for count in range(1, 4):
        outputs = engine.step()
        assert tokens_of(outputs) == expected_output([1, 2], 3)[count - 1 : count]
        assert len(executor.batches) == count  # the one on its way is yet to be computed
        assert (engine._in_flight is not None) is (count < 3)
    assert not engine.has_unfinished
    assert_idle(engine)


def test_a_stop_text_keeps_a_request_out_of_the_next_step() -> None:
    executor = FakeExecutor(64, 8, VirtualClock())
    executor.pipelined = True
    engine = Engine(
        EngineConfig(block_size=8),
        executor,
        CacheShape(64, 256),
        clock=executor.clock or time.perf_counter,
        detokenizer=FakeDetokenizer(),
    )
    stop = as_text(expected_output([1], 12))[6:8]
    engine.add("a", [1], SamplingParams(temperature=0.0, max_tokens=12, stop=stop))
    outputs = run(engine)["a"]
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert len(executor.batches) == len(tokens_of(outputs)) <= 4


@pytest.mark.parametrize("how", ["abort", "abort_all"])
def test_an_abort_of_what_is_on_its_way_leaves_once(how: str) -> None:
    engine, _ = make_engine(pipelined=True, max_num_seqs=2)
    for name in ("a", "b", "c"):
        engine.add(name, [1, 2], greedy(8))
    engine.step()
    engine.step()
    abort: Callable[[], None] = (
        engine.abort_all if how == "abort_all" else lambda: engine.abort("a")
    )
    abort()
    outputs = run(engine)
    assert [o.finish_reason for o in outputs["a"]][-1] is FinishReason.ABORT
    assert [o.finish_reason for o in outputs["a"]].count(FinishReason.ABORT) == 1
    # What came before the abort is handed out before it; what is thrown away is no output.
    request = outputs["a"][0].request
    assert [1, 2, *expected_output([1, 2], 1), *tokens_of(outputs["a"])] == request.token_ids
    assert_idle(engine)


def test_a_launch_that_fails_keeps_the_outputs_of_the_step_before() -> None:
    engine, executor = make_engine(pipelined=True)
    engine.add("a", [1, 2], greedy(1))
    engine.add("b", [3, 4], greedy(4))
    engine.step()
    executor.fail_next, executor.fail_at_launch = MemoryError("no room"), True
    with pytest.raises(MemoryError, match="no room"):
        engine.step()
    outputs = {o.request_id: o for o in engine.step() if o.finish_reason is not None}
    assert outputs["a"].finish_reason is FinishReason.LENGTH
    assert outputs["a"].token_ids == expected_output([1, 2], 1)
    assert outputs["b"].finish_reason is FinishReason.ABORT
    assert outputs["b"].request.output_token_ids == expected_output([3, 4], 1)
    assert_idle(engine)


def test_an_interrupt_while_waiting_loses_nothing() -> None:
    engine, executor = make_engine(pipelined=True)
    engine.add("a", [1, 2], greedy(4))
    engine.step()
    executor.fail_next = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert tokens_of(run(engine)["a"]) == expected_output([1, 2], 4)
    assert_idle(engine)


def test_reconfigure_waits_for_what_is_on_its_way() -> None:
    engine, _ = make_engine(pipelined=True)
    engine.add("a", [1, 2], greedy(6))
    engine.step()
    engine.reconfigure(block_size=16)
    assert engine.next_wakeup() == engine.clock()
    outputs = engine.step()
    assert tokens_of(outputs) == expected_output([1, 2], 1)
    assert tokens_of(outputs + run(engine)["a"]) == expected_output([1, 2], 6)
    engine.add("b", [3] * 20, greedy(1))
    engine.step()
    engine.clear_prefix_cache()
    assert [o.finish_reason for o in engine.step()] == [FinishReason.LENGTH]
    assert engine.pool.num_cached == 0
    assert_idle(engine)


class Threaded(FakeExecutor):
    """A device of its own pace: computes in a thread, `seconds` a step."""

    seconds = 0.004

    def launch(self, batch: Batch) -> Threaded.InFlight:  # type: ignore[override]
        return Threaded.InFlight(self, as_packed(batch))

    class InFlight:
        def __init__(self, executor: Threaded, batch: Batch) -> None:
            self._results: list[BatchResult] = []
            self._thread = threading.Thread(target=self._run, args=(executor, batch))
            self._thread.start()

        def _run(self, executor: Threaded, batch: Batch) -> None:
            begin = time.perf_counter()
            time.sleep(executor.seconds)
            result = FakeExecutor.execute(executor, batch)
            result.device_seconds = time.perf_counter() - begin
            self._results.append(result)

        def wait(self) -> BatchResult:
            self._thread.join()
            return self._results[0]


def test_a_device_that_works_meanwhile() -> None:
    """Steps' records cover the engine's time once, and none of what the caller does meanwhile."""
    records: list[StepRecord] = []
    executor = Threaded(64, 8)
    executor.pipelined = True
    engine = Engine(
        EngineConfig(block_size=8), executor, CacheShape(64, 256), on_step=records.append
    )
    for i in range(3):
        engine.add(str(i), [i, 7], greedy(10))
    outputs: dict[str, list[int]] = {}
    begin = time.perf_counter()
    idle = 0.0
    while engine.has_unfinished:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).extend(output.token_ids)
        if len(records) == 5:
            before = time.perf_counter()
            time.sleep(0.1)
            idle += time.perf_counter() - before
    elapsed = time.perf_counter() - begin
    assert outputs == {str(i): expected_output([i, 7], 10) for i in range(3)}
    assert len(records) == 10
    assert sum(r.decode_sequences for r in records) == 27
    assert all(r.device_seconds >= executor.seconds for r in records)
    assert all(r.host_seconds >= 0.0 for r in records)
    # The device worked at most one step's time of the caller's pause.
    assert sum(r.seconds for r in records) <= elapsed - (
        idle - max(r.device_seconds for r in records)
    )
    for earlier, later in itertools.pairwise(records):
        assert later.start >= earlier.start + earlier.device_seconds


@pytest.mark.parametrize(
    ("returned", "asked", "idle"),
    [
        (11.0, 11.5, 0.0),  # back before the device had finished, at 12
        (11.0, 13.0, 1.0),  # a second late
        (12.5, 12.75, 0.25),  # outputs took longer than the device: only what came after counts
        (12.5, 12.5, 0.0),
    ],
)
def test_time_of_the_callers_own(returned: float, asked: float, idle: float) -> None:
    step = LaunchedStep(Batch([], 0), 9.0, 0.5, 0, 0, 0, 0, 0, 0, AttentionWork(), 0)
    step.launched, step.returned = 10.0, returned
    assert step.idle_seconds(asked, device_seconds=2.0) == idle
    record = step.record(BatchResult([], 2.0, host_seconds=0.25), end=14.0, idle_seconds=idle)
    assert record.seconds == 5.0 - idle


def test_a_real_model_says_the_same(tmp_path: Path) -> None:
    """With prompts in chunks, draws with seeds, and log-probabilities."""
    make_tiny_llama(tmp_path)
    config = EngineConfig(
        model=str(tmp_path),
        device="cpu",
        max_num_batched_tokens=12,
        max_num_seqs=3,
        block_size=8,
        kv_cache_memory_bytes=1 << 16,
        max_model_len=60,
    )
    loaded = load_model(config)
    results = []
    for pipelined in (False, True):
        loaded.runner.pipelined = pipelined
        engine = loaded.engine(config)
        for i in range(6):
            sampling = SamplingParams(
                temperature=0.9 * (i % 2), seed=i, max_tokens=20, logprobs=2 if i == 3 else None
            )
            engine.add(str(i), [i + 1] * (9 + i), sampling, arrival=0.0)
        outputs: dict[str, list[tuple[list[int], object]]] = {}
        while engine.has_unfinished:
            for output in engine.step():
                outputs.setdefault(output.request_id, []).append(
                    (output.token_ids, output.logprobs)
                )
        results.append(outputs)
        assert_idle(engine)
    assert results[0] == results[1]
    assert len(results[0]["5"]) == 20
