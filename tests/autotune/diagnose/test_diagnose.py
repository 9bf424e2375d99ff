"""Findings from profiles made by hand: what is named, in which order, and how pressing."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from autotune.diagnose.diagnose import diagnose
from autotune.diagnose.finding import METRICS
from autotune.profiling.schema import (
    Bounded,
    Communication,
    Gpu,
    MeasuredSpeculation,
    Profile,
    StepFit,
)
from tests.autotune.diagnose.profiles import (
    BASE,
    MODEL,
    WAITING,
    breakdowns,
    first,
    kv,
    metrics,
    named,
    parts,
    phase,
    profile,
    queueing,
    traffic,
)


def fit(median_error: float) -> StepFit:
    return StepFit(coefficients={}, median_error=median_error, p90_error=1.0, steps=100)


@pytest.mark.parametrize(
    ("metric", "bottleneck", "changed"),
    [
        ("ttft", "prefill_compute", {}),
        (
            "ttft",
            "prefill_bandwidth",
            {"breakdowns": breakdowns(ttft=parts(weights=0.7, prefill_linear=0.2))},
        ),
        (
            "ttft",
            "queue_saturation",
            {"breakdowns": WAITING, "queueing": queueing(utilisation=1.4, stable=False)},
        ),
        (
            "ttft",
            "queue_bursts",
            {"breakdowns": WAITING, "traffic": traffic(arrival_cv=3.0, dispersion=8.0)},
        ),
        (
            "ttft",
            "prefill_interference",
            {"breakdowns": breakdowns(ttft=parts(interference=0.7, prefill_linear=0.2))},
        ),
        (
            "ttft",
            "kv_capacity",
            {"breakdowns": WAITING, "kv": kv(blocked_share=0.6, occupancy_peak=1.0)},
        ),
        (
            "ttft",
            "static_batching",
            {"breakdowns": WAITING, "queueing": queueing(barrier_share=0.7)},
        ),
        (
            "ttft",
            "low_batch",
            {
                "breakdowns": WAITING,
                "queueing": queueing(at_seat_limit_share=0.8, utilisation=1.5, stable=False),
                "engine_config": {"max_num_seqs": 4},
            },
        ),
        (
            "ttft",
            "poor_prefix_reuse",
            {"kv": kv(hit_rate=0.05, attainable_hit_rate=0.7)},
        ),
        ("tpot", "decode_weights", {}),
        (
            "tpot",
            "decode_kv",
            {"breakdowns": breakdowns(tpot=parts(weights=0.2, kv_reads=0.7))},
        ),
        (
            "tpot",
            "decode_compute",
            {"breakdowns": breakdowns(tpot=parts(linear_compute=0.7, kv_reads=0.2))},
        ),
        (
            "tpot",
            "prefill_interference",
            {"breakdowns": breakdowns(tpot=parts(weights=0.5, interference=0.4))},
        ),
        (
            "tpot",
            "host_bound",
            {"breakdowns": breakdowns(tpot=parts(weights=0.5, host=0.4))},
        ),
        (
            "tpot",
            "kv_capacity",
            {"breakdowns": breakdowns(tpot=parts(weights=0.5, preempted=0.4))},
        ),
        (
            "tpot",
            "communication",
            {
                "breakdowns": breakdowns(tpot=parts(weights=0.5, communication=0.4)),
                "communication": Communication(ranks=2, share=0.4, imbalance=0.1),
            },
        ),
        (
            "tpot",
            "load_imbalance",
            {
                "breakdowns": breakdowns(tpot=parts(weights=0.3, communication=0.6)),
                "communication": Communication(ranks=2, share=0.6, imbalance=0.8),
            },
        ),
        (
            "tpot",
            "throttling",
            {
                "gpu": Gpu(
                    samples=[],
                    interval_s=0.1,
                    power_mean_watts=690.0,
                    power_limit_watts=700.0,
                    clock_ratio=0.6,
                    throttled_share=0.95,
                    throttle_reasons={"sw_power_cap": 0.95},
                )
            },
        ),
        (
            "throughput",
            "low_batch",
            {
                "breakdowns": breakdowns(throughput=parts(weights=0.8, prefill_linear=0.1)),
                "queueing": queueing(
                    at_seat_limit_share=0.9, queue_mean=30.0, running_mean=4.0, utilisation=1.2
                ),
                "engine_config": {"max_num_seqs": 4},
            },
        ),
        (
            "throughput",
            "static_batching",
            {
                "breakdowns": breakdowns(throughput=parts(weights=0.8, prefill_linear=0.1)),
                "queueing": queueing(barrier_share=0.9, queue_mean=20.0, running_mean=5.0),
            },
        ),
        (
            "throughput",
            "kv_capacity",
            {
                "breakdowns": breakdowns(throughput=parts(weights=0.8, prefill_linear=0.1)),
                "kv": kv(blocked_share=0.9),
                "queueing": queueing(queue_mean=20.0, running_mean=5.0),
            },
        ),
        (
            "throughput",
            "long_outputs",
            {
                "breakdowns": breakdowns(throughput=parts(weights=0.8, idle=0.1)),
                "traffic": traffic(top_output_share=0.8),
            },
        ),
        ("cost", "low_load", {"breakdowns": breakdowns(throughput=parts(idle=0.9, weights=0.05))}),
        (
            "cost",
            "queue_saturation",
            {
                "metrics": metrics() | {"slo_attainment": 0.1},
                "queueing": queueing(utilisation=1.5, stable=False),
            },
        ),
        (
            "memory",
            "kv_capacity",
            {"kv": kv(blocked_share=0.3, preempted_share=0.2, occupancy_peak=1.0)},
        ),
        ("memory", "kv_capacity", {"kv": kv(refused_for_size=1)}),
        (
            "memory",
            "model_does_not_fit",
            {"hardware": {"device": "cpu", "memory_bytes": MODEL.resident_bytes - 1}},
        ),
    ],
)
def test_the_first_finding_is_what_takes_the_time(
    metric: str, bottleneck: str, changed: dict[str, Any]
) -> None:
    found = named(profile(**changed), metric)
    assert found[0] == bottleneck, found


def test_findings_of_a_metric_stand_worst_first_and_once_each() -> None:
    diagnosis = diagnose(BASE)
    for metric in METRICS:
        found = diagnosis.of(metric)
        assert [f.severity for f in found] == sorted((f.severity for f in found), reverse=True)
        assert len({f.bottleneck for f in found}) == len(found)
        for finding in found:
            assert 0.05 <= finding.share <= 1.0
            assert 0.0 <= finding.severity <= finding.share
            assert finding.sentence.endswith(".")
            assert "None" not in finding.sentence


def test_shares_of_a_metrics_time_do_not_count_anything_twice() -> None:
    hot = Gpu(samples=[], interval_s=0.1, clock_ratio=0.7, throttled_share=1.0)
    busy = profile(
        gpu=hot,
        kv=kv(attainable_hit_rate=0.5, blocked_share=0.4),
        queueing=queueing(queue_mean=10.0, at_seat_limit_share=0.3, utilisation=1.1),
        traffic=traffic(top_output_share=0.7),
        engine_config={"max_num_seqs": 8},
    )
    diagnosis = diagnose(busy)
    for metric in ("ttft", "tpot", "throughput"):
        shares = [f.share for f in diagnosis.of(metric) if f.bottleneck != "long_prompts"]
        assert sum(shares) <= 1.0 + 1e-9, metric


def test_a_limit_that_is_met_by_far_is_less_pressing_than_one_that_is_missed() -> None:
    calm = first(diagnose(profile(metrics=metrics(ttft=0.02))), "ttft")
    missed = first(diagnose(profile(metrics=metrics(ttft=0.4))), "ttft")
    assert calm.share == missed.share
    assert calm.severity == pytest.approx(missed.severity / 4)
    assert calm.level == "low"


def test_a_server_without_fault_has_no_finding_of_high_severity() -> None:
    assert all(f.level != "high" for f in diagnose(BASE).findings)


def test_eager_launches_of_a_gpu_are_the_hosts() -> None:
    eager = profile(
        breakdowns=breakdowns(tpot=parts(weights=0.3)),
        phases=[phase("decode", bound="overhead")],
        hardware={"device": "cuda", "memory_bytes": 2**37},
        engine_config={"cuda_graphs": False, "max_num_seqs": 256},
    )
    assert named(eager, "tpot")[0] == "host_bound"
    graphs = eager.model_copy(update={"engine_config": {"cuda_graphs": True}})
    assert "host_bound" not in named(graphs, "tpot")


def test_device_time_that_no_work_explains_is_named_as_such() -> None:
    unexplained = breakdowns(tpot=parts(weights=0.2), ttft=parts(prefill_linear=0.2))
    slow = profile(breakdowns=unexplained, step_fit=fit(median_error=0.05))
    assert named(slow, "tpot")[0] == named(slow, "ttft")[0] == "step_overhead"
    assert "measure again" not in first(diagnose(slow), "tpot").sentence
    erratic = profile(breakdowns=unexplained, step_fit=fit(median_error=0.8))
    assert "measure again" in first(diagnose(erratic), "tpot").sentence
    assert "step_overhead" not in named(profile(breakdowns=unexplained), "tpot")


def drafts(accepted: int) -> MeasuredSpeculation:
    tokens = 1 + accepted / 100
    return MeasuredSpeculation(
        method="ngram",
        num_speculative_tokens=4,
        adaptive=False,
        decodes=100,
        drafted_decodes=100,
        drafted_tokens=400,
        accepted_tokens=accepted,
        hit_share=1.0,
        tokens_per_step=Bounded(value=tokens, low=tokens, high=tokens),
        verified_tokens=4.0,
    )


def test_drafts_that_are_rejected_are_named_and_a_loss_where_they_do_not_pay() -> None:
    spent = breakdowns(
        tpot=parts(weights=0.4, drafting=0.2, verification=0.3),
        throughput=parts(weights=0.1, drafting=0.05, verification=0.2, idle=0.5),
    )
    bad = profile(breakdowns=spent, measured_speculation=drafts(40))
    worst = first(diagnose(bad), "tpot")
    assert worst.bottleneck == "speculation_overhead"
    # 1.4 tokens in twice the time of a step without drafts.
    assert worst.share == pytest.approx(0.2 + 0.3 * 0.9)
    assert "without drafts" in worst.sentence
    assert "speculation_overhead" in named(bad, "throughput")
    good = profile(breakdowns=spent, measured_speculation=drafts(200))
    found = next(f for f in diagnose(good).of("tpot") if f.bottleneck == "speculation_overhead")
    assert found.share == pytest.approx(0.2 + 0.3 * 0.5)
    assert found.severity < 0.5 * worst.severity
    assert "more than it costs" in found.sentence
    for name in found.evidence:
        assert name.split(".")[0] in Profile.model_fields
    idle = profile(
        breakdowns=spent, measured_speculation=drafts(0).model_copy(update={"drafted_tokens": 0})
    )
    assert "speculation_overhead" not in named(idle, "tpot")
    assert "speculation_overhead" not in named(profile(breakdowns=spent), "tpot")


def test_long_prompts_are_named_behind_the_work_that_they_make() -> None:
    found = named(profile(traffic=traffic(prompt_output_ratio=20.0)), "ttft")
    assert found.index("prefill_compute") < found.index("long_prompts")
    assert "long_prompts" not in named(BASE, "ttft")


def test_a_brief_touch_of_the_power_limit_is_no_finding() -> None:
    calm = Gpu(samples=[], interval_s=0.1, clock_ratio=0.6, throttled_share=0.05)
    assert "throttling" not in named(profile(gpu=calm), "tpot")
    fast = Gpu(samples=[], interval_s=0.1, clock_ratio=0.99, throttled_share=1.0)
    assert "throttling" not in named(profile(gpu=fast), "tpot")


def test_clocks_that_fall_in_some_samples_cost_what_they_fall_on_average() -> None:
    # Half of the samples at 60% of the clock: 0.8 on average, and a fifth of the work is lost.
    half = Gpu(samples=[], interval_s=0.1, clock_ratio=0.8, throttled_share=0.5)
    slowed = profile(gpu=half, breakdowns=breakdowns(tpot=parts(weights=0.9, host=0.1)))
    shares = {f.bottleneck: f.share for f in diagnose(slowed).of("tpot")}
    assert shares["throttling"] == pytest.approx(0.2 * 0.9)


def test_clocks_that_nvml_withholds_leave_a_note() -> None:
    unknown = Gpu(samples=[], interval_s=0.1, throttled_share=0.5)
    assert any("slowed in 50%" in note for note in diagnose(profile(gpu=unknown)).notes)
    (untold,) = diagnose(profile(gpu=Gpu(samples=[], interval_s=0.1, clock_ratio=0.7))).notes
    assert "NVML withholds the reasons" in untold


def test_seats_as_many_as_a_step_can_use_are_not_too_few() -> None:
    full = profile(
        breakdowns=WAITING,
        queueing=queueing(at_seat_limit_share=0.9, utilisation=1.3, stable=False),
        engine_config={"max_num_seqs": 90},
    )
    assert named(full, "ttft")[0] == "queue_saturation"


def test_a_full_cache_that_nobody_waits_for_is_no_pressing_matter() -> None:
    full = first(diagnose(profile(kv=kv(occupancy_peak=0.97))), "memory")
    assert full.bottleneck == "kv_capacity"
    assert full.level != "high"
    assert not diagnose(BASE).of("memory")


def test_weights_may_be_divided_among_gpus_but_not_among_ranks_of_one_processor() -> None:
    memory = MODEL.resident_bytes - 1
    two = {"max_num_seqs": 256, "tensor_parallel_size": 2}
    gpus = profile(hardware={"device": "cuda", "memory_bytes": memory}, engine_config=two)
    assert not diagnose(gpus).of("memory")
    processor = profile(hardware={"device": "cpu", "memory_bytes": memory}, engine_config=two)
    assert named(processor, "memory") == ["model_does_not_fit"]


def test_evidence_names_fields_of_the_profile() -> None:
    for finding in diagnose(profile(queueing=queueing(utilisation=0.95))).findings:
        for name in finding.evidence:
            assert name.split(".")[0] in {*Profile.model_fields, "sequences_possible"}, name


def test_the_same_profile_has_the_same_diagnosis_on_disk() -> None:
    once, again = (diagnose(BASE).to_json() for _ in range(2))
    assert json.dumps(once, allow_nan=False) == json.dumps(again, allow_nan=False)
    assert {f["metric"] for f in once["findings"]} <= set(METRICS)
    assert set(dataclasses.asdict(diagnose(BASE).findings[0])) <= set(once["findings"][0])
