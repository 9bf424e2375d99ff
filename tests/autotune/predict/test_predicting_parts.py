"""What a replay is made of: traffic, the loop's times, the machine's pace, the cache, intervals."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest

from autotune.model_info import with_default_model
from autotune.predict.asked import latency_statistics
from autotune.predict.cache_after import cache_after
from autotune.predict.intervals import Z90, bounds, single_trials_spread, trial_noise
from autotune.predict.load_times import LoadTimes, load_times
from autotune.predict.pace import Pace, recorded_pace
from autotune.predict.recorded_traffic import (
    changed_traffic,
    jittered,
    leading_requests,
    recorded_drain_limit,
    recorded_requests,
)
from autotune.predict.replay import replay
from autotune.predict.served import served
from autotune.profiling.evidence import LoadEvidence
from autotune.profiling.schema import KvCache
from autotune.records import RequestRecord
from autotune.slo import parse_slo
from autotune.workload.materialise import LoadRequest
from engine.checkpoints.model_folder import open_model_folder
from engine.config import EngineConfig
from engine.engine import CacheShape
from engine.kv_cache import num_blocks_for
from engine.loading import DTYPES
from engine.models.registry import decoder_spec
from engine.step_record import StepRecord
from tests.autotune.predict.played_profile import cost, play, requests

CONFIG = with_default_model(EngineConfig(device="cpu"))


def record(
    request_id: str, send: float, times: tuple[float, ...], **others: object
) -> RequestRecord:
    return RequestRecord(
        request_id,
        send,
        send,
        times,
        int(others.get("input_tokens", 10)),  # type: ignore[call-overload]
        len(times),
        len(times),
        "finished",
        cached_tokens=int(others.get("cached_tokens", 0)),  # type: ignore[call-overload]
    )


def test_made_up_prompts_share_what_was_found_in_the_cache() -> None:
    records = [
        record("a", 0.0, (1.0,), input_tokens=40),
        record("b", 1.0, (2.0,), input_tokens=50, cached_tokens=32),
        record("c", 2.0, (3.0,), input_tokens=20),
    ]
    made = recorded_requests(LoadEvidence(records, []))
    first, second, third = (r.token_ids for r in made)
    assert second[:32] == first[:32]
    assert set(second[32:]).isdisjoint(first)
    assert set(third).isdisjoint(first + second)
    assert [len(r.token_ids) for r in made] == [40, 50, 20]


def test_changed_traffic_keeps_order_and_scales_what_it_is_told() -> None:
    load = [LoadRequest(str(i), float(i), tuple(range(10)), 8) for i in range(10)]
    changed = changed_traffic(load, rate=2.0, input_tokens=0.5, output_tokens=0.25, share=0.4)
    assert len(changed) == 4
    assert all(r.token_ids == tuple(range(5)) and r.output_tokens == 2 for r in changed)
    assert [r.arrival_s for r in changed] == [int(r.request_id) / 2 for r in changed]
    longer = changed_traffic(load[:2], input_tokens=1.5)
    assert all(r.token_ids[:10] == tuple(range(10)) and len(r.token_ids) == 15 for r in longer)
    assert set(longer[0].token_ids[10:]).isdisjoint(longer[1].token_ids[10:])


def test_leading_requests_stop_at_the_budget_but_are_not_too_few() -> None:
    load = [LoadRequest(str(i), float(i), (1,) * 16, 9) for i in range(30)]
    assert len(leading_requests(load, 100, 3)) == 10
    assert len(leading_requests(load, 1, 3)) == 3


def test_when_a_load_gave_up_is_read_off_its_end() -> None:
    load = requests(40, rate=8.0)
    assert recorded_drain_limit(LoadEvidence(*_played(load, 60.0))) is None
    records, steps = _played(load, 0.25)
    assert any(r.outcome == "timed_out" for r in records)
    found = recorded_drain_limit(LoadEvidence(records, steps))
    assert found is not None
    # The step under way at the limit is brought to its end.
    assert 0.25 <= found < 0.25 + max(s.seconds for s in steps) + 1e-9


def _played(
    load: list[LoadRequest], drain_limit: float
) -> tuple[list[RequestRecord], list[StepRecord]]:
    played = replay(
        load,
        CONFIG,
        cost(CONFIG),
        CacheShape(4096, 2048),
        drain_limit=drain_limit,
        keep_steps=True,
    )
    return played.records, played.steps


def test_the_loops_times_are_read_off_the_records() -> None:
    load = requests(30, rate=2.0)
    played = play(CONFIG, load, 4096)
    assert load_times(LoadEvidence(played.records, played.steps)).gap == pytest.approx(0, abs=1e-9)
    shifted, late = [], 0.0
    for step in played.steps:
        late += 0.001 if step.decode_sequences else 0.0
        shifted.append(dataclasses.replace(step, start=step.start + late))
    found = load_times(LoadEvidence(played.records, shifted))
    assert found == LoadTimes(gap=pytest.approx(0.001), arrival=found.arrival)


def test_the_wait_of_a_request_that_meets_an_idle_engine_is_found() -> None:
    load = requests(30, rate=0.2)
    played = play(CONFIG, load, 4096)
    early = [dataclasses.replace(r, intended_send=r.intended_send - 0.02) for r in played.records]
    found = load_times(LoadEvidence(early, played.steps))
    assert found.arrival == pytest.approx(0.02)


def test_a_slow_moment_is_slow_in_the_pace_and_only_then() -> None:
    played = play(CONFIG, requests(80, rate=4.0), 4096)
    middle = played.duration / 2
    slowed = [
        dataclasses.replace(s, device_seconds=s.device_seconds * (3 if s.start > middle else 1))
        for s in played.steps
    ]
    pace = recorded_pace(slowed, cost(CONFIG))
    assert pace.at(middle / 2) == pytest.approx(1.0, abs=0.25)
    assert pace.at(1.5 * middle) == pytest.approx(3.0, rel=0.25)
    assert 1.0 < pace.mean < 3.0
    assert pace.at(1e6) == pace.mean == pace.steady.at(0.0)
    assert pace.slowed(2.0).at(middle / 2) == pytest.approx(2 * pace.at(middle / 2))
    assert (
        pace.drift > recorded_pace(played.steps, cost(CONFIG)).drift == pytest.approx(0, abs=1e-6)
    )


def test_without_steps_the_pace_is_even() -> None:
    assert recorded_pace([], cost(CONFIG)) == Pace()


@pytest.mark.parametrize(
    "knobs",
    [
        {"block_size": 32},
        {"kv_cache_dtype": "int8"},
        {"kv_cache_memory_bytes": 64 << 20},
        {"kv_cache_memory_bytes": 64 << 20, "kv_cache_dtype": "int8", "block_size": 8},
        {"max_num_seqs": 64},
    ],
)
def test_the_cache_after_a_change_has_the_blocks_that_the_engine_would_have(
    knobs: dict[str, object],
) -> None:
    spec = decoder_spec(open_model_folder(CONFIG.model))

    def blocks(config: EngineConfig) -> int:
        from engine.kv_cache import cache_dtype

        budget = config.kv_cache_memory_bytes or 4 << 30
        dtype = cache_dtype(config, DTYPES["bfloat16"])
        return num_blocks_for(config, spec, dtype, spec.max_position, budget)

    changed = CONFIG.replace(**knobs)
    base = served(CONFIG)
    assert base is not None
    kv = KvCache(blocks_total=blocks(CONFIG), block_size=CONFIG.block_size)
    after = served(changed, base)
    assert after is not None
    shape = cache_after(base, after, kv, on_gpu=False)
    assert shape is not None
    assert shape.num_blocks == blocks(changed)


def test_on_a_gpu_smaller_weights_leave_more_for_the_cache() -> None:
    base = served(CONFIG)
    assert base is not None
    small = served(CONFIG.replace(quantization="int8"), base)
    assert small is not None
    kv = KvCache(blocks_total=1000, block_size=16)
    here = cache_after(base, small, kv, on_gpu=True)
    freed = base.model.resident_bytes - small.model.resident_bytes
    assert here is not None
    assert here.num_blocks == 1000 + int(freed / small.block_bytes)
    more = cache_after(
        base,
        dataclasses.replace(small, config=CONFIG.replace(gpu_memory_utilization=0.95)),
        kv,
        on_gpu=True,
        gpu_bytes=1 << 30,
    )
    assert more is not None
    assert more.num_blocks > here.num_blocks


def test_a_cache_that_cannot_hold_the_longest_sequence_is_none() -> None:
    base = served(CONFIG)
    assert base is not None
    small = served(CONFIG.replace(kv_cache_memory_bytes=100_000), base)
    assert small is not None
    kv = KvCache(blocks_total=1000, block_size=16)
    assert cache_after(base, small, kv, on_gpu=False) is None
    halved = cache_after(base, base, kv, on_gpu=False, capacity=0.05)
    assert halved is not None
    assert halved.num_blocks == 50
    assert halved.max_model_len == 50 * 16


def test_bounds_add_independent_errors_in_quadrature() -> None:
    low, high = bounds(2.0, [[1.0, 4.0], [2.0 / 3, 6.0]], noise=0.1)
    wide = math.sqrt(math.log(2) ** 2 + math.log(3) ** 2 + (Z90 * 0.1) ** 2)
    assert low == pytest.approx(2.0 * math.exp(-wide))
    assert high == pytest.approx(2.0 * math.exp(wide))
    assert bounds(2.0, []) == (2.0, 2.0)
    assert bounds(2.0, [[3.0]]) == (2.0, 3.0)


def test_trial_noise_is_what_two_trials_of_equal_requests_differ_by() -> None:
    rng = random.Random(1)
    played = [record(str(i), 0.0, (rng.uniform(1, 3),)) for i in range(400)]
    jittered = [
        dataclasses.replace(r, token_times=(r.token_times[0] * rng.lognormvariate(0.7, 0.2),))
        for r in played
    ]
    noise = trial_noise(jittered, played, "ttft", "mean", seed=0)
    # A mean of 400 factors with a spread of 0.2, in both trials; a common factor is no noise.
    assert noise == pytest.approx(math.sqrt(2) * 0.2 / math.sqrt(400), rel=0.35)
    assert trial_noise(played, played, "ttft", "p95", seed=0) == 0.0
    assert trial_noise(played[:3], played[:3], "ttft", "p95", seed=0) is None


def test_single_trials_spread_by_their_own_chance_and_that_of_the_means() -> None:
    first, second = [0.0, 0.2], [1.0, 1.4]
    other = 0.4 / math.sqrt(2)
    expected = math.sqrt(0.1**2 * 1.5 + other**2 * 1.5)
    assert single_trials_spread(first, second) == pytest.approx(expected)
    # A change of which little is known spreads as the default does.
    assert single_trials_spread(first, [1.0]) == pytest.approx(math.sqrt(0.1**2 * (1.5 + 2)))
    assert single_trials_spread([1.0, 1.0], [2.0, 2.0]) == 0.0


def test_a_turned_pace_has_the_same_moments_elsewhere() -> None:
    pace = Pace(1.5, 1.0, (1.0, 2.0, 3.0))
    assert pace.turned(1).factors == (3.0, 1.0, 2.0)
    assert pace.turned(3) == pace.turned(0) == pace
    assert Pace().turned(2) == Pace()


def test_jittered_requests_are_a_little_later_and_otherwise_the_same() -> None:
    load = requests(20, rate=2.0)
    later = jittered(load, 0.01, seed=1)
    shifts = [b.arrival_s - a.arrival_s for a, b in zip(load, later, strict=True)]
    assert all(0 <= shift <= 0.01 for shift in shifts)
    assert len(set(shifts)) > 10
    assert [r.token_ids for r in later] == [r.token_ids for r in load]
    assert later == jittered(load, 0.01, seed=1) != jittered(load, 0.01, seed=2)


def test_the_statistic_is_that_of_the_limit_that_is_furthest_missed() -> None:
    slo = parse_slo("p50(ttft)<1s,p99(ttft)<1.1s,mean(itl)<1s")
    metrics = {
        "ttft": {"p50": 2.0, "p99": 2.1},
        "itl": {"mean": 0.1},
        "completed": 5,
        "failed": 0,
        "refused": 0,
        "timed_out": 0,
    }
    assert latency_statistics(slo, metrics) == {
        "ttft": "p50",
        "tpot": "p95",
        "e2e": "p95",
        "itl": "mean",
    }
    assert latency_statistics(None, None)["ttft"] == "p95"
