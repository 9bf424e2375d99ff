import json
import math
import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune import metrics
from autotune.metrics import (
    bootstrap_intervals,
    compute_metrics,
    latencies,
)
from autotune.records import RequestRecord
from autotune.slo import Slo, parse_slo
from engine.config import EngineConfig
from engine.step_record import StepRecord

BENCH_KEYS = {
    "ttft",
    "tpot",
    "itl",
    "e2e",
    "output_tokens_per_s",
    "requests_per_s",
    "goodput_requests_per_s",
    "slo_attainment",
    "completed",
    "failed",
    "refused",
    "timed_out",
    "duration_s",
    "offered_rate",
    "error_rate",
    "load_delivered",
    "load_note",
    "config",
    "engine",
}


def request(
    intended: float,
    tokens: tuple[float, ...],
    *,
    outcome: str = "finished",
    asked: int | None = None,
) -> RequestRecord:
    return RequestRecord(
        request_id=str(intended),
        intended_send=intended,
        send=intended + 0.001,
        token_times=tokens,
        input_tokens=10,
        output_tokens=len(tokens),
        asked_output_tokens=len(tokens) if asked is None else asked,
        outcome=outcome,  # type: ignore[arg-type]
    )


def compute(records: list[RequestRecord], slo: Slo | None, **options: Any) -> dict[str, Any]:
    return compute_metrics(
        records, slo, config=EngineConfig(), load_delivered=True, load_note=None, **options
    )


def test_by_hand() -> None:
    records = [
        request(0.0, (0.1, 0.2, 0.4)),  # ttft 0.1, tpot 0.15, e2e 0.4
        request(1.0, (1.3,)),  # ttft 0.3, one token
        request(2.0, (2.2, 2.3), outcome="timed_out", asked=9),
        request(4.0, (), outcome="refused", asked=5),
    ]
    got = compute(records, parse_slo("ttft<200ms,tpot<100ms"), duration=5.0)
    assert got.keys() >= BENCH_KEYS
    assert got["ttft"]["mean"] == pytest.approx(0.2)
    assert got["ttft"]["p50"] == pytest.approx(0.2)
    assert got["ttft"]["p95"] == pytest.approx(0.29)
    assert got["tpot"]["p99"] == pytest.approx(0.15)
    assert got["itl"]["mean"] == pytest.approx(0.15)
    assert got["itl"]["p90"] == pytest.approx(0.19)
    assert got["e2e"]["p50"] == pytest.approx(0.35)
    assert got["output_tokens_per_s"] == pytest.approx(4 / 5)
    assert got["requests_per_s"] == pytest.approx(2 / 5)
    assert got["offered_rate"] == pytest.approx(3 / 4)
    assert (got["completed"], got["failed"], got["refused"], got["timed_out"]) == (2, 0, 1, 1)
    assert got["error_rate"] == 0.5
    assert got["goodput_requests_per_s"] == 0.0
    assert got["slo_attainment"] == 0.0
    looser = compute(records, parse_slo("ttft<400ms,tpot<150.1ms"), duration=5.0)
    assert looser["goodput_requests_per_s"] == pytest.approx(2 / 5)
    assert looser["slo_attainment"] == 0.5
    low, high = looser["intervals"]["goodput_requests_per_s"]
    assert 0 < low < 2 / 5 < high < 4 / 5
    json.dumps(got, allow_nan=False)


def test_nothing_measured_is_none_not_zero() -> None:
    for records in ([], [request(0.0, (), outcome="failed", asked=3)]):
        got = compute(records, parse_slo("ttft<1s"))
        for metric in ("ttft", "tpot", "itl", "e2e"):
            intervals = got[metric].pop("intervals")
            assert set(got[metric].values()) | set(intervals.values()) == {None}
        assert got["offered_rate"] is None
        assert got["engine"]["mean_batch"] is None
        assert got["slo_attainment"] == (0.0 if records else None)
        json.dumps(got, allow_nan=False)
    assert compute([request(0.0, (1.0,))], None)["goodput_requests_per_s"] is None


def test_duration_is_until_the_last_token_by_default() -> None:
    assert compute([request(0.0, (1.0, 4.0)), request(3.0, (3.5,))], None)["duration_s"] == 4.0
    assert compute([request(3.0, (), outcome="refused")], None)["duration_s"] == 3.001


def test_the_slo_is_held_against_every_request_not_only_finished_ones() -> None:
    slo = parse_slo("ttft<200ms,p50(ttft)<200ms,mean(e2e)<1s,itl<1s")
    quick = [request(float(i), (i + 0.1, i + 0.2)) for i in range(18)]
    lost = [request(50.0 + i, (), outcome="timed_out", asked=2) for i in range(2)]
    met = slo.evaluate(compute(quick, slo))
    assert all(result.met for result in met)
    got = compute(quick + lost, slo)
    assert got["ttft"]["p95"] == pytest.approx(0.1)
    # 2 of 20 never came: rank 18.05 of 0..19 is one of them, the median is not.
    assert got["slo_statistics"] == {
        "p95(ttft)": None,
        "p50(ttft)": pytest.approx(0.1),
        "mean(e2e)": None,
        "p95(itl)": None,
    }
    assert [result.met for result in slo.evaluate(got)] == [False, True, False, False]


def test_an_unfinished_request_counts_with_all_the_gaps_it_was_asked_for() -> None:
    slo = parse_slo("p40(itl)<1s,p60(itl)<1s")
    finished = [request(float(i), (i + 0.1, i + 0.2)) for i in range(10)]
    lost = request(20.0, (), outcome="timed_out", asked=11)
    got = compute([*finished, lost], slo)["slo_statistics"]
    assert got == {"p40(itl)": pytest.approx(0.1), "p60(itl)": None}


def test_statistics_that_the_slo_names_are_computed() -> None:
    slo = parse_slo("p99.9(ttft)<1s,p75(itl)<1s")
    got = compute([request(float(i), (i + 0.1 * i, i + 1.0 + i)) for i in range(9)], slo)
    assert got["ttft"]["p99.9"] == pytest.approx(np.percentile(0.1 * np.arange(9), 99.9))
    assert got["ttft"]["intervals"]["p99.9"] is not None
    assert "p75" in got["itl"]
    assert "p75" not in got["ttft"]


_times = st.lists(st.floats(0.0, 5.0), min_size=0, max_size=6)


def test_tokens_that_arrive_together_are_one_chunk() -> None:
    records = [request(0.0, (0.1, 0.3, 0.3, 0.3, 0.4)), request(0.0, (0.2, 0.2))]
    values, owners = latencies("itl", records)
    assert values.tolist() == pytest.approx([0.2, 0.1])
    assert owners.tolist() == [0, 0]
    assert latencies("tpot", records)[0].tolist() == pytest.approx([0.075, 0.0])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 20), _times, st.sampled_from(["finished", "timed_out", "failed"])),
        min_size=1,
        max_size=12,
    ),
    st.floats(0.01, 6.0),
    st.floats(0.01, 3.0),
)
def test_against_brute_force(
    raw: list[tuple[float, list[float], str]], ttft_bound: float, tpot_bound: float
) -> None:
    records = []
    for intended, delays, outcome in raw:
        tokens, now = [], intended
        for delay in delays:
            now += delay
            tokens.append(now)
        records.append(request(intended, tuple(tokens), outcome=outcome if tokens else "failed"))
    slo = parse_slo(f"ttft<{ttft_bound!r}s,tpot<{tpot_bound!r}s")
    got = compute(records, slo, duration=30.0)
    ttfts, tpots, gaps, ends, good = [], [], [], [], 0
    for r in records:
        if r.outcome != "finished":
            continue
        times = r.token_times
        ttft = times[0] - r.intended_send
        end = times[-1] - r.intended_send
        ttfts.append(ttft)
        ends.append(end)
        gaps += [b - a for a, b in pairwise(times) if b > a]
        tpot = None
        if len(times) > 1:
            tpot = (times[-1] - times[0]) / (len(times) - 1)
            tpots.append(tpot)
        good += ttft < ttft_bound and (tpot is None or tpot < tpot_bound)
    for metric, values in (("ttft", ttfts), ("tpot", tpots), ("itl", gaps), ("e2e", ends)):
        for name in ("mean", "p50", "p90", "p95", "p99"):
            want = None
            if values:
                want = np.mean(values) if name == "mean" else np.percentile(values, int(name[1:]))
            assert got[metric][name] == (None if want is None else pytest.approx(want, abs=1e-12))
    assert got["goodput_requests_per_s"] == pytest.approx(good / 30)
    assert got["slo_attainment"] == pytest.approx(good / len(records))


def test_bootstrap_agrees_with_drawing_the_resamples() -> None:
    rng = np.random.default_rng(random.randrange(2**32))
    records = [
        request(0.0, tuple(np.cumsum(rng.exponential(1.0, rng.integers(2, 9))))) for _ in range(12)
    ]
    statistics = ("p50", "mean", "p90", "p99")
    values, owners = latencies("itl", records)
    got = bootstrap_intervals(values, owners, statistics, seed=5, resamples=300)
    generator = np.random.default_rng(5)
    drawn = []
    for _ in range(300):
        chosen = generator.integers(12, size=12)
        pooled = np.concatenate([np.diff(records[i].token_times) for i in chosen])
        drawn.append([*np.percentile(pooled, [50, 90, 99]), pooled.mean()])
    bounds = np.percentile(drawn, [2.5, 97.5], axis=0)
    for column, name in enumerate(("p50", "p90", "p99", "mean")):
        assert got[name] == pytest.approx(bounds[:, column].tolist(), rel=1e-12)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        values = rng.exponential(1.0, 80)
        interval = bootstrap_intervals(values, np.arange(80), ("p50",), trial, resamples=200)["p50"]
        assert interval is not None
        covered += interval[0] <= math.log(2) <= interval[1]
    assert 0.88 <= covered / 200 <= 0.99


def test_gaps_of_one_request_are_drawn_together() -> None:
    # Two kinds of request: all gaps of one are 1 s, of the other 2 s. Drawing gaps one by one
    # would make the mean nearly certain.
    values = np.repeat([1.0, 2.0], 500)
    owners = np.repeat([0, 1, 2, 3], 250)
    interval = bootstrap_intervals(values, owners, ("mean",), 0)["mean"]
    assert interval is not None
    assert interval[1] - interval[0] > 0.5


@pytest.mark.parametrize("together", [1, 25 * 7, 1 << 30])
def test_resamples_are_the_same_however_many_are_drawn_at_once(
    monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    values, owners = np.random.default_rng(1).random(25), np.arange(25) // 2
    expected = bootstrap_intervals(values, owners, ("mean", "p90"), 3)
    monkeypatch.setattr(metrics, "_TOGETHER", together)
    found = bootstrap_intervals(values, owners, ("mean", "p90"), 3)
    for name in ("mean", "p90"):  # sums of other sizes round otherwise
        assert found[name] == pytest.approx(expected[name], rel=1e-12)


def test_bootstrap_is_seeded_and_needs_two_requests() -> None:
    values, owners = np.arange(20.0), np.arange(20)
    same = [bootstrap_intervals(values, owners, ("p90",), seed) for seed in (3, 3, 4)]
    assert same[0] == same[1]
    assert same[0] != same[2]
    assert bootstrap_intervals(values, np.zeros(20), ("p90",), 0) == {"p90": None}
    records = [request(float(i), (i + 0.1 * (i % 7), i + 1.0)) for i in range(30)]
    assert compute(records, Slo(), seed=1) == compute(records, Slo(), seed=1)
    assert compute(records, Slo(), seed=1) != compute(records, Slo(), seed=2)


def step(**changes: float) -> StepRecord:
    values: dict[str, Any] = dict.fromkeys(StepRecord.__dataclass_fields__, 0)
    return StepRecord(**{**values, **changes})


def test_engine_summary() -> None:
    steps = [
        step(
            prefill_tokens=30,
            prefill_sequences=2,
            prefix_hit_tokens=10,
            device_seconds=0.3,
            host_seconds=0.1,
            blocks_used=5,
            blocks_total=20,
        ),
        step(
            decode_sequences=4,
            preemptions=1,
            device_seconds=0.5,
            host_seconds=0.1,
            blocks_used=15,
            blocks_total=20,
        ),
    ]
    got = compute([], None, steps=steps)["engine"]
    assert got == {
        "steps": 2,
        "preemptions": 1,
        "prefix_hit_rate": 0.25,
        "kv_blocks_total": 20,
        "kv_peak_usage": 0.75,
        "mean_batch": 3.0,
        "host_share": pytest.approx(0.2),
        "device_share": pytest.approx(0.8),
    }
