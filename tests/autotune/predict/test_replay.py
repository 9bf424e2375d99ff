"""The replay schedules as the engine does."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest

from autotune.model_info import with_default_model
from autotune.predict.decoding import Decoding
from autotune.predict.load_times import LoadTimes
from autotune.predict.replay import replay
from autotune.predict.step_cost import StepWork
from autotune.predict.step_times import DecodeLine
from autotune.records import RequestRecord
from autotune.workload.materialise import LoadRequest
from engine.config import EngineConfig
from engine.engine import CacheShape
from engine.loading import load_model
from engine.request import SamplingParams
from engine.step_record import StepRecord
from tests.engine.fake_executor import VOCABULARY, VirtualClock, greedy, make_engine

TIMES = ("start", "device_seconds", "host_seconds", "scheduler_seconds")


class FakeCost:
    """What `FakeExecutor` takes for a step."""

    def decode_line(self, sequences: int) -> DecodeLine | None:
        return None

    def device_seconds(self, work: StepWork) -> float:
        return 0.001 + 1e-5 * work.rows

    def host_seconds(self, work: StepWork) -> float:
        return 0.0


class FastCost(FakeCost):
    """The same, so that runs of steps can be taken at once."""

    def decode_line(self, sequences: int) -> DecodeLine | None:
        return DecodeLine((0.0,), (0.001 + 1e-5 * sequences,))


def same(record: RequestRecord) -> RequestRecord:
    """A record whose times are equal where sums in another order differ in their last digits."""
    first = record.first_scheduled
    return dataclasses.replace(
        record,
        token_times=tuple(round(time, 9) for time in record.token_times),
        first_scheduled=None if first is None else round(first, 9),
    )


class FixedCost:
    """The same for every step, on the device and on the host."""

    def __init__(self, device: float, host: float = 0.0) -> None:
        self.device, self.host = device, host

    def decode_line(self, sequences: int) -> DecodeLine | None:
        work = StepWork(sequences, 0, sequences, sequences, 0, 0, 0)
        return DecodeLine((0.0,), (self.device_seconds(work) + self.host,))

    def device_seconds(self, work: StepWork) -> float:
        return self.device

    def host_seconds(self, work: StepWork) -> float:
        return self.host


class RowCost(FixedCost):
    """A time for each row of a step."""

    def device_seconds(self, work: StepWork) -> float:
        return self.device * work.rows


def load(
    count: int, seed: int, longest: int = 60, rate: float | None = None, shared: int = 0
) -> list[LoadRequest]:
    rng = random.Random(seed)
    stem = tuple(rng.randrange(VOCABULARY) for _ in range(shared))
    now, requests = 0.0, []
    for index in range(count):
        now += rng.expovariate(rate) if rate else 0.0
        prompt = tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, longest)))
        requests.append(LoadRequest(f"{index}", now, stem + prompt, rng.randint(1, 30)))
    return requests


def without_times(steps: list[StepRecord]) -> list[dict[str, Any]]:
    return [{k: v for k, v in dataclasses.asdict(step).items() if k not in TIMES} for step in steps]


SITUATIONS: list[tuple[dict[str, Any], int, dict[str, Any]]] = [
    ({}, 64, {}),
    ({"max_num_batched_tokens": 32, "max_num_seqs": 4}, 64, {}),
    ({"max_num_batched_tokens": 16, "max_num_seqs": 16}, 24, {}),  # preempts
    ({"batching_mode": "static", "max_num_seqs": 4}, 64, {}),
    ({"scheduling_policy": "sjf", "max_num_seqs": 4}, 64, {}),
    ({"enable_prefix_caching": False}, 64, {"shared": 40}),
    ({"max_num_seqs": 4}, 48, {"shared": 40}),
    ({"enable_chunked_prefill": False, "max_num_batched_tokens": 256}, 64, {}),
    ({"block_size": 16, "watermark": 0.1}, 20, {}),
]


@pytest.mark.parametrize(("knobs", "blocks", "traffic"), SITUATIONS)
@pytest.mark.parametrize("rate", [None, 300.0])
def test_it_takes_the_same_steps_at_the_same_times_as_the_engine(
    knobs: dict[str, Any], blocks: int, traffic: dict[str, Any], rate: float | None
) -> None:
    requests = load(40, seed=len(knobs) + blocks, rate=rate, **traffic)
    engine, executor = make_engine(blocks, **knobs)
    steps: list[StepRecord] = []
    engine.on_step = steps.append
    clock = engine.clock
    assert isinstance(clock, VirtualClock)
    finished: dict[str, float] = {}
    outputs: dict[str, list[int]] = {}
    left = list(requests)
    while left or engine.has_unfinished:
        while left and left[0].arrival_s <= clock.now:
            one = left.pop(0)
            engine.add(
                one.request_id,
                one.token_ids,
                greedy(one.output_tokens, ignore_eos=True),
                arrival=one.arrival_s,
            )
        if not engine.has_unfinished:
            clock.now = left[0].arrival_s
            continue
        for output in engine.step():
            outputs.setdefault(output.request_id, []).extend(output.token_ids)
            finished[output.request_id] = clock.now
    shape = CacheShape(blocks, engine.max_model_len)
    played = replay(
        requests,
        engine.config,
        FakeCost(),
        shape,
        drain_limit=60.0,
        outputs=outputs,
        keep_steps=True,
    )
    assert without_times(played.steps) == without_times(steps)
    for time in TIMES:
        expected = [getattr(step, time) for step in steps]
        assert [getattr(step, time) for step in played.steps] == pytest.approx(expected, abs=1e-9)
    assert {r.request_id: r.token_times[-1] for r in played.records if r.completed} == {
        r.request_id: finished[r.request_id] for r in played.records if r.completed
    }
    silent = replay(requests, engine.config, FakeCost(), shape, drain_limit=60.0, outputs=outputs)
    assert silent.records == played.records
    fast = replay(requests, engine.config, FastCost(), shape, drain_limit=60.0, outputs=outputs)
    assert [same(r) for r in fast.records] == [same(r) for r in played.records]
    assert fast.totals.steps == len(steps)
    if blocks == 24:
        assert sum(step.preemptions for step in steps) > 0
    if "shared" in traffic:
        hits = sum(step.prefix_hit_tokens for step in steps)
        assert (hits > 0) is engine.config.enable_prefix_caching
    assert executor.batches


def test_it_takes_the_same_steps_as_a_real_model_when_all_arrives_at_once() -> None:
    config = with_default_model(
        EngineConfig(
            device="cpu",
            kv_cache_memory_bytes=4 << 20,
            max_num_seqs=8,
            max_num_batched_tokens=128,
            max_model_len=256,
        )
    )
    model = load_model(config)
    steps: list[StepRecord] = []
    engine = model.engine(config, on_step=steps.append)
    rng = random.Random(5)
    stem = tuple(rng.randrange(1000) for _ in range(64))
    requests = [
        LoadRequest(
            str(i),
            0.0,
            (stem if i % 2 else ()) + tuple(rng.randrange(1000) for _ in range(rng.randint(1, 90))),
            rng.randint(1, 25),
        )
        for i in range(24)
    ]
    for one in requests:
        sampling = SamplingParams(temperature=0.0, max_tokens=one.output_tokens, ignore_eos=True)
        engine.add(one.request_id, one.token_ids, sampling)
    outputs: dict[str, list[int]] = {}
    while engine.has_unfinished:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).extend(output.token_ids)
    shape = CacheShape(engine.pool.num_blocks, engine.max_model_len)
    played = replay(
        requests,
        config,
        FakeCost(),
        shape,
        drain_limit=60.0,
        outputs=outputs,
        keep_steps=True,
    )
    assert without_times(played.steps) == without_times(steps)
    assert sum(step.prefix_hit_tokens for step in steps) > 0


def test_a_request_that_comes_during_a_step_waits_for_its_end() -> None:
    requests = [LoadRequest("a", 0.0, (1,), 2), LoadRequest("b", 0.3, (2,), 1)]
    played = replay(
        requests, EngineConfig(), FixedCost(0.9, 0.1), CacheShape(8, 64), drain_limit=9.0
    )
    assert played.records[0].token_times == (1.0, 2.0)
    assert played.records[1].first_scheduled == 1.0
    assert played.records[1].token_times == (2.0,)
    assert played.duration == 2.0


def test_the_gap_between_steps_passes_on_the_clock() -> None:
    played = replay(
        [LoadRequest("a", 0.0, (1,), 3)],
        EngineConfig(),
        FixedCost(1.0),
        CacheShape(8, 64),
        drain_limit=9.0,
        times=LoadTimes(gap=0.5),
    )
    assert played.records[0].token_times == (1.0, 2.5, 4.0)


def test_what_is_unfinished_after_the_drain_limit_timed_out() -> None:
    requests = [LoadRequest("a", 0.0, (1,), 30), LoadRequest("b", 0.0, (2,), 2)]
    played = replay(requests, EngineConfig(), FixedCost(1.0), CacheShape(8, 64), drain_limit=4.5)
    assert [r.outcome for r in played.records] == ["timed_out", "finished"]
    assert len(played.records[0].token_times) == 5
    assert played.records[0].reason == "not finished 4.5 s after the last arrival"


def test_a_prompt_that_can_never_fit_is_refused_with_a_reason() -> None:
    played = replay(
        [LoadRequest("a", 0.0, (1,) * 100, 4)],
        EngineConfig(),
        FixedCost(1.0),
        CacheShape(2, 64),
        drain_limit=5.0,
    )
    assert played.records[0].outcome == "refused"
    assert played.records[0].reason
    assert played.duration == 0.0


def test_speculation_yields_its_tokens_on_the_mean_and_computes_what_it_verifies() -> None:
    plain = replay(
        [LoadRequest("a", 0.0, (1,) * 10, 41)],
        EngineConfig(),
        RowCost(1.0),
        CacheShape(64, 512),
        drain_limit=99.0,
    )
    spoken = replay(
        [LoadRequest("a", 0.0, (1,) * 10, 41)],
        EngineConfig(),
        RowCost(1.0),
        CacheShape(64, 512),
        drain_limit=99.0,
        decoding=Decoding(tokens_per_step=2.5, verify_tokens=4.0),
        keep_steps=True,
    )
    assert plain.duration == 10 + 40
    assert len(spoken.records[0].token_times) == 41
    assert len(spoken.steps) == 1 + 16
    assert spoken.duration == 10 + 16 * 4


def test_prompts_that_run_elsewhere_are_done_one_after_another() -> None:
    requests = [LoadRequest(name, 0.0, (i,) * 10, 2) for i, name in enumerate("ab")]
    played = replay(
        requests,
        EngineConfig(),
        RowCost(1.0),
        CacheShape(64, 512),
        drain_limit=99.0,
        decoding=Decoding(prompt_share=0.0),
    )
    assert played.records[0].token_times == (10.0, 11.0)
    # The second prompt is done at 20; its first step here costs nothing of it.
    assert played.records[1].token_times == (20.0, 21.0)


def test_ids_of_a_load_must_differ() -> None:
    one = LoadRequest("a", 0.0, (1,), 2)
    with pytest.raises(ValueError, match="must differ"):
        replay([one, one], EngineConfig(), FixedCost(1.0), CacheShape(8, 64), drain_limit=1.0)
