"""Whatever the knobs and the traffic, a virtual engine takes the steps that the engine takes."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.predict.step_cost import StepWork
from autotune.predict.step_times import DecodeLine
from autotune.predict.virtual_engine import VirtualEngine
from autotune.workload.materialise import LoadRequest
from engine.batch import Batch
from engine.engine import CacheShape
from engine.request import FinishReason
from engine.step_record import StepRecord
from tests.engine.fake_executor import VOCABULARY, VirtualClock, greedy, make_engine

MAX_MODEL_LEN = 128
# What no simulation of the scheduler knows: how long choosing took on this machine's clock.
UNTOLD = ("scheduler_seconds",)
# Windows of groups of layers; 0 sees all.
WINDOWS: tuple[tuple[int, ...], ...] = ((0,), (0,), (0, 20), (9,))


class ExecutorsCost:
    """What `FakeExecutor` takes for a step."""

    def decode_line(self, sequences: int) -> DecodeLine | None:
        return DecodeLine((0.0,), (0.001 + 1e-5 * sequences,))

    def device_seconds(self, work: StepWork) -> float:
        return 0.001 + 1e-5 * work.rows

    def host_seconds(self, work: StepWork) -> float:
        return 0.0


Decision = list[tuple[str, int, int, bool]]


def served(
    requests: Sequence[LoadRequest],
    blocks: int,
    windows: Sequence[int],
    knobs: Mapping[str, Any],
) -> tuple[list[Decision], list[StepRecord], dict[str, list[int]], dict[str, float]]:
    """What the engine decides, records and generates, and when each request finishes."""
    engine, executor = make_engine(blocks, MAX_MODEL_LEN, windows=windows, **knobs)
    steps: list[StepRecord] = []
    engine.on_step = steps.append
    clock = engine.clock
    assert isinstance(clock, VirtualClock)
    outputs: dict[str, list[int]] = {}
    finished: dict[str, float] = {}
    left = list(requests)
    while left or engine.has_unfinished:
        while left and left[0].arrival_s <= clock.now:
            one = left.pop(0)
            sampling = greedy(one.output_tokens, ignore_eos=True)
            engine.add(one.request_id, one.token_ids, sampling, arrival=one.arrival_s)
        due = left[0].arrival_s if left else float("inf")
        if not engine.has_unfinished:
            clock.now = due
            continue
        wakeup = engine.next_wakeup()
        if wakeup is not None and wakeup > clock.now:
            clock.now = min(wakeup, due)
            if due <= clock.now:
                continue
        for output in engine.step():
            outputs.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish_reason is not FinishReason.REFUSED:
                finished[output.request_id] = clock.now
    return executor.batches, steps, outputs, finished


class Overheard(VirtualEngine):
    """Also keeps the batches that its scheduler chose."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batches: list[Decision] = []
        schedule = self.scheduler.schedule

        def overhear(now: float) -> Batch:
            batch = schedule(now)
            if batch.sequences:
                self.batches.append(
                    [
                        (s.request.request_id, s.start, s.num_tokens, s.samples)
                        for s in batch.sequences
                    ]
                )
            return batch

        self.scheduler.schedule = overhear  # type: ignore[method-assign]


@given(
    blocks=st.sampled_from([17, 20, 28, 64]),
    windows=st.sampled_from(WINDOWS),
    knobs=st.fixed_dictionaries(
        {
            "max_num_seqs": st.integers(1, 8),
            "max_num_batched_tokens": st.sampled_from([8, 16, 33, 128]),
            "enable_chunked_prefill": st.sampled_from([True, True, False]),
            "enable_prefix_caching": st.booleans(),
            "long_prefill_token_threshold": st.sampled_from([0, 0, 5]),
            "scheduling_policy": st.sampled_from(["fcfs", "sjf", "priority"]),
            "batching_mode": st.sampled_from(["continuous", "continuous", "static", "dynamic"]),
            "max_queue_delay": st.sampled_from([0.0, 0.004, 0.5]),
            "max_num_queued_reqs": st.sampled_from([None, None, 3]),
            "watermark": st.sampled_from([0.0, 0.0, 0.2]),
        }
    ),
    count=st.integers(1, 30),
    rate=st.sampled_from([None, 30.0, 300.0, 3000.0]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_it_decides_as_the_engine_does(
    blocks: int,
    windows: tuple[int, ...],
    knobs: dict[str, Any],
    count: int,
    rate: float | None,
    seed: int,
) -> None:
    rng = random.Random(seed)
    stem = tuple(rng.randrange(VOCABULARY) for _ in range(40))
    requests, now = [], 0.0
    for number in range(count):
        now += rng.expovariate(rate) if rate else 0.0
        prompt = tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 70)))
        start = stem[: rng.choice([0, 0, 17, 40])]
        requests.append(LoadRequest(f"{number}", now, start + prompt, rng.randint(1, 50)))
    decisions, steps, outputs, finished = served(requests, blocks, windows, knobs)

    engine, _ = make_engine(blocks, MAX_MODEL_LEN, windows=windows, **knobs)
    shape = CacheShape(blocks, MAX_MODEL_LEN, engine._groups)
    played: list[StepRecord] = []
    told = Overheard(engine.config, ExecutorsCost(), shape, outputs=outputs, on_step=played.append)
    fast = VirtualEngine(engine.config, ExecutorsCost(), shape, outputs=outputs)
    for one in requests:
        for virtual in (told, fast):
            virtual.run(one.arrival_s)
            virtual.send(one, one.arrival_s)
    for virtual in (told, fast):
        virtual.run()

    assert told.batches == decisions
    assert [without(step) for step in played] == [without(step) for step in steps]
    records = {r.request_id: r for r in told.take_records()}
    assert {k: r.token_times[-1] for k, r in records.items() if r.completed} == finished
    assert {r.request_id for r in records.values() if r.outcome == "refused"} == {
        r.request_id for r in requests if r.request_id not in finished
    }
    assert fast.totals.steps == len(steps)
    for record in fast.take_records():
        same = records[record.request_id]
        assert record.outcome == same.outcome
        assert record.cached_tokens == same.cached_tokens
        assert record.preemptions == same.preemptions
        times = zip(record.token_times, same.token_times, strict=True)
        assert all(abs(one - other) < 1e-9 for one, other in times)


def without(step: StepRecord) -> dict[str, Any]:
    """A step as it can be compared: times to the nanosecond, as sums differ in their last bit."""
    values = dataclasses.asdict(step)
    for name in UNTOLD:
        del values[name]
    return {k: round(v, 9) if isinstance(v, float) else v for k, v in values.items()}
