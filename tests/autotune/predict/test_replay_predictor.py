"""Gains by replay, against loads whose truth is known because they were played."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from autotune.predict.change import Change, Factor
from autotune.predict.gain import PredictedGain
from autotune.predict.predictor import Predictor, predictor_for
from autotune.predict.replay_predictor import ReplayPredictor
from autotune.profiling.evidence import LoadEvidence
from autotune.profiling.schema import Profile
from autotune.slo import parse_slo
from autotune.workload.materialise import LoadRequest
from engine.config import EngineConfig
from tests.autotune.predict.played_profile import metrics_of, play, profiled, requests

# Enough for all of these loads.
BUDGET_S = 30.0


def predictor(found: tuple[Profile, LoadEvidence], slo: str = "") -> Predictor:
    parsed = parse_slo(slo) if slo else None
    return predictor_for(*found, parsed, seed=0, budget_s=BUDGET_S)


def gain(gains: tuple[PredictedGain, ...], metric: str) -> PredictedGain:
    return next(g for g in gains if g.metric == metric)


def truth(
    load: list[LoadRequest], found: tuple[Profile, LoadEvidence], metric: str, **knobs: Any
) -> float:
    """The ratio of p95 that two played loads have; `blocks` may change with the knobs."""
    profile = found[0]
    assert profile.engine_config is not None
    blocks = profile.kv.blocks_total
    assert blocks is not None
    config = EngineConfig.from_mapping(profile.engine_config).replace(**knobs)
    after = metrics_of(play(config, load, blocks), config)
    assert profile.metrics is not None
    return float(profile.metrics[metric]["p95"] / after[metric]["p95"])


@pytest.fixture(scope="module")
def paced() -> tuple[list[LoadRequest], tuple[Profile, LoadEvidence]]:
    load = requests(80, rate=4.0, output=40)
    return load, profiled(load)


def test_without_a_change_it_predicts_what_was_measured(
    paced: tuple[list[LoadRequest], tuple[Profile, LoadEvidence]],
) -> None:
    _, found = paced
    predicted = predictor(found).metrics()
    measured = found[0].metrics
    assert predicted is not None
    assert measured is not None
    for metric in ("ttft", "tpot", "e2e"):
        for statistic in ("mean", "p50", "p95"):
            assert predicted[metric][statistic] == pytest.approx(
                measured[metric][statistic], rel=0.02
            )
    assert predicted["output_tokens_per_s"] == pytest.approx(
        measured["output_tokens_per_s"], rel=0.01
    )
    assert predicted["engine"]["steps"] == measured["engine"]["steps"]


def test_a_slower_machine_than_its_probes_say_is_predicted_as_slow_as_it_was() -> None:
    found = profiled(requests(80, rate=2.0), scale=1.7)
    predicted, measured = predictor(found).metrics(), found[0].metrics
    assert predicted is not None
    assert measured is not None
    assert predicted["tpot"]["p95"] == pytest.approx(measured["tpot"]["p95"], rel=0.05)


@pytest.mark.parametrize(
    "knobs",
    [
        {"quantization": "int8"},
        {"kv_cache_dtype": "int8"},
        {"max_num_seqs": 3},
        {"max_num_batched_tokens": 256},
        {"scheduling_policy": "sjf", "max_num_seqs": 3},
    ],
)
def test_a_predicted_gain_is_that_of_the_changed_load(
    paced: tuple[list[LoadRequest], tuple[Profile, LoadEvidence]], knobs: dict[str, Any]
) -> None:
    load, found = paced
    gains = predictor(found).gains(Change(knobs))
    for metric in ("ttft", "tpot", "e2e"):
        predicted = gain(gains, metric)
        real = truth(load, found, metric, **knobs)
        assert predicted.value == pytest.approx(real, rel=0.05)
        assert predicted.low < predicted.value < predicted.high
        assert predicted.low <= real <= predicted.high
        assert predicted.statistic == "p95"
        assert predicted.basis == "replay"


def test_a_change_without_effect_gains_exactly_nothing_on_an_uneven_machine() -> None:
    profile, evidence = profiled(requests(70, rate=5.0))
    uneven = [
        dataclasses.replace(s, device_seconds=s.device_seconds * (1 + int(s.start) % 3))
        for s in evidence.steps
    ]
    judge = predictor((profile, dataclasses.replace(evidence, steps=uneven)))
    for metric in ("ttft", "tpot", "e2e"):
        told = gain(judge.gains(Change({"max_num_seqs": 200})), metric)
        assert told.value == 1.0
        # Two trials of one configuration differ all the same.
        assert told.low < 0.97 < 1.03 < told.high


def test_throughput_is_that_of_all_requests_at_once() -> None:
    load = requests(60, rate=None)
    found = profiled(load)
    predicted = gain(predictor(found).gains(Change({"quantization": "int8"})), "throughput")
    config = EngineConfig.from_mapping(found[0].engine_config or {})
    changed = config.replace(quantization="int8")
    before, after = (metrics_of(play(c, load, 4096), c) for c in (config, changed))
    real = after["output_tokens_per_s"] / before["output_tokens_per_s"]
    assert predicted.value == pytest.approx(real, rel=0.03)
    assert real > 1.2


def test_prefix_caching_helps_where_prompts_share_a_beginning() -> None:
    load = requests(80, rate=4.0, shared=512, prompt=20, output=20)
    found = profiled(load, enable_prefix_caching=False)
    change = Change({"enable_prefix_caching": True})
    predicted = gain(predictor(found).gains(change), "ttft")
    assert predicted.value == pytest.approx(
        truth(load, found, "ttft", enable_prefix_caching=True), rel=0.05
    )
    assert predicted.value > 1.5


def test_without_prompts_hits_are_those_that_were_recorded() -> None:
    load = requests(80, rate=4.0, shared=512, prompt=20, output=20)
    profile, evidence = profiled(load)
    bare = LoadEvidence(evidence.requests, evidence.steps)
    predicted = predictor((profile, bare)).metrics()
    assert predicted is not None
    assert profile.metrics is not None
    assert predicted["engine"]["prefix_hit_rate"] == pytest.approx(
        profile.metrics["engine"]["prefix_hit_rate"], abs=0.03
    )
    assert predicted["ttft"]["p95"] == pytest.approx(profile.metrics["ttft"]["p95"], rel=0.05)


def test_a_knob_that_the_engine_refuses_or_no_probe_knows_has_no_gain(
    paced: tuple[list[LoadRequest], tuple[Profile, LoadEvidence]],
) -> None:
    judge = predictor(paced[1])
    for knobs in (
        {"max_num_seqs": 0},
        {"no_such_knob": 1},
        {"quantization": "nf4"},
        {"tensor_parallel_size": 2},
        {"kv_cache_memory_bytes": 1},
    ):
        assert judge.gains(Change(knobs)) == ()
        assert judge.metrics(Change(knobs)) is None


def test_a_range_of_a_factor_is_in_the_interval(
    paced: tuple[list[LoadRequest], tuple[Profile, LoadEvidence]],
) -> None:
    judge = predictor(paced[1])
    sure = gain(judge.gains(Change({}, {"device": Factor(0.5, 0.5, 0.5)})), "tpot")
    unsure = gain(judge.gains(Change({}, {"device": Factor(0.5, 0.3, 0.9)})), "tpot")
    assert sure.value == unsure.value
    assert sure.value > 1.7
    assert unsure.low < sure.low < sure.high < unsure.high
    assert unsure.low < 1 / 0.9 * 1.05


def test_speculation_divides_the_time_of_a_token(
    paced: tuple[list[LoadRequest], tuple[Profile, LoadEvidence]],
) -> None:
    change = Change(
        {},
        {"tokens_per_step": Factor(2.0, 1.8, 2.2), "verify_tokens": Factor(4.0, 4.0, 4.0)},
    )
    told = gain(predictor(paced[1]).gains(change), "tpot")
    assert 1.3 < told.value < 2.5


def test_requests_kept_from_the_model_count_as_served() -> None:
    found = profiled(requests(80, rate=None))
    half = Change({}, {"requests": Factor(0.5, 0.5, 0.5)})
    told = gain(predictor(found).gains(half), "throughput")
    assert told.value == pytest.approx(2.0, rel=0.15)


def test_cost_follows_throughput_and_price(
    paced: tuple[list[LoadRequest], tuple[Profile, LoadEvidence]],
) -> None:
    change = Change({}, {"device": Factor(0.5, 0.5, 0.5), "price": Factor(2.0, 2.0, 2.0)})
    gains = predictor(paced[1]).gains(change)
    assert gain(gains, "cost").value == pytest.approx(gain(gains, "throughput").value / 2)


def test_quantized_weights_take_less_memory(
    paced: tuple[list[LoadRequest], tuple[Profile, LoadEvidence]],
) -> None:
    judge = predictor(paced[1])
    assert gain(judge.gains(Change({"quantization": "int8"})), "memory").value > 1.0
    assert gain(judge.gains(Change({"max_num_seqs": 9})), "memory").value == 1.0


def test_statistics_are_those_of_the_slo(
    paced: tuple[list[LoadRequest], tuple[Profile, LoadEvidence]],
) -> None:
    gains = predictor(paced[1], "p50(ttft)<1s,mean(tpot)<1s").gains(Change({"max_num_seqs": 9}))
    assert {g.metric: g.statistic for g in gains if g.statistic} == {
        "ttft": "p50",
        "tpot": "mean",
        "e2e": "p95",
    }


def test_more_arrivals_make_longer_waits(
    paced: tuple[list[LoadRequest], tuple[Profile, LoadEvidence]],
) -> None:
    judge = predictor(paced[1])
    waits = [judge.metrics(rate_factor=factor) for factor in (0.5, 1.0, 4.0)]
    values = [m["ttft"]["p95"] for m in waits if m is not None]
    assert values == sorted(values)
    assert values[0] < values[2]
    at_once = judge.metrics(rate_factor=None)
    assert at_once is not None
    assert at_once["ttft"]["mean"] > values[1]


def test_equal_profiles_give_equal_predictions() -> None:
    load = requests(70, rate=5.0)
    change = Change({"quantization": "int8", "max_num_seqs": 4})
    first, second = (predictor(profiled(load)).gains(change) for _ in range(2))
    assert first == second


def test_a_small_budget_replays_the_beginning_of_the_load() -> None:
    found = profiled(requests(300, rate=5.0))
    small = predictor_for(*found, None, seed=0, budget_s=0.1)
    assert isinstance(small, ReplayPredictor)
    metrics = small.metrics()
    assert metrics is not None
    assert 60 <= metrics["completed"] < 300
