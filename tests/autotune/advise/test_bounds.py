"""Bounds against figures worked out by hand and against traffic that was made up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from autotune.advise.bounds import Bound, Bounds
from autotune.profiling.schema import LinearProbe, Probes, Profile, Speculation, Spread
from autotune.profiling.speculation_schema import Bounded, MeasuredSpeculation
from autotune.slo import parse_slo
from tests.autotune.advise.feasibility_profiles import HARDWARE, ceilings, model, profile, spread

INT8_CPU: dict[str, Any] = {"device": "cpu", "cpu": {"features": ["avx512_vnni"]}, "gpus": []}


def dry_run(tokens: float) -> Speculation:
    return Speculation(
        num_requests=50,
        min_ngram=2,
        max_ngram=4,
        tokens_per_step={1: 1.0, 5: tokens},
        hit_share=0.5,
    )


def measured(high: float) -> MeasuredSpeculation:
    return MeasuredSpeculation(
        method="ngram",
        num_speculative_tokens=4,
        adaptive=True,
        decodes=100,
        drafted_decodes=50,
        drafted_tokens=200,
        accepted_tokens=100,
        hit_share=0.5,
        tokens_per_step=Bounded(value=2.0, low=1.9, high=high),
        verified_tokens=2.0,
    )


def bound(of: Profile, limit: str) -> Bound:
    bounds = Bounds.of(of)
    assert bounds is not None
    slo = parse_slo(limit)
    found = bounds.of_limit(slo.limits[-1], slo)
    assert found is not None
    return found


def test_a_token_costs_a_pass_over_the_weights_and_its_context() -> None:
    found = bound(profile(inputs=spread(1000, p95=4000), hardware=HARDWARE), "tpot<1ms")
    # 20 ms of weights; 4000 tokens of 100 kB, in a cache of 8 bits half, at 100 GB/s.
    assert found.value == pytest.approx(0.020 + 0.002)
    assert "1.86 GiB of weights" in found.proof
    mean = bound(profile(inputs=spread(1000, p95=4000)), "mean(tpot)<1ms")
    assert mean.value == pytest.approx(0.020 + 0.0005)


def windowed(**changes: Any) -> Profile:
    """Short prompts, and attention that forgets: a step is a pass of 20 ms over the weights."""
    return profile(model=model(has_windows=True), inputs=spread(10), **changes)


def test_what_a_pass_bounds_is_shared_by_the_tokens_of_a_step() -> None:
    """By the dry run, or by what was measured, whichever is more."""
    drafted = windowed(speculation=dry_run(2.5), outputs=spread(101))
    assert bound(drafted, "tpot<1ms").value == pytest.approx(0.020 / 2.5)
    assert "2.5 tokens that are the most known" in bound(drafted, "tpot<1ms").proof
    assert bound(drafted, "e2e<1ms").value == pytest.approx(100 * 0.020 / 2.5)
    assert bound(drafted, "mean(itl)<1ms").value == pytest.approx(0.020 / 2.5)
    better = windowed(speculation=dry_run(2.5), measured_speculation=measured(4.0))
    assert bound(better, "tpot<1ms").value == pytest.approx(0.020 / 4.0)
    assert bound(windowed(speculation=dry_run(1.0)), "tpot<1ms").value == pytest.approx(0.020)


def test_gaps_within_a_step_are_none() -> None:
    """Of 2.5 tokens a step, 60% of the gaps are nothing and 40% are a step."""
    drafted = windowed(speculation=dry_run(2.5))
    assert bound(drafted, "p50(itl)<1ms").value == 0.0
    assert bound(drafted, "p95(itl)<1ms").value == pytest.approx(0.020)


@pytest.mark.parametrize(
    ("limit", "certain"),
    [
        ("tpot<1ms", False),  # 64 tokens of 20 ms are 0.3 ms each
        ("tpot<250us", True),
        ("p95(itl)<1ms", False),  # no more than one gap in 64 is a step
        ("p99(itl)<1ms", True),
        ("mean(itl)<250us", True),
        ("e2e<100ms", False),
        ("e2e<20ms", True),
    ],
)
def test_certain_is_what_the_most_drafts_there_can_be_would_not_meet(
    limit: str, certain: bool
) -> None:
    assert bound(windowed(outputs=spread(101)), limit).certain is certain


def test_windows_leave_the_context_out() -> None:
    assert bound(profile(model=model(has_windows=True)), "tpot<1ms").value == pytest.approx(0.020)


def test_of_experts_only_those_that_a_token_meets_are_read() -> None:
    facts = model(has_experts=True, num_experts=8, experts_per_token=2, expert_bytes=1_600_000_000)
    # 400 MB of other weights and a quarter of the experts.
    assert bound(profile(model=facts), "itl<1ms").value == pytest.approx(0.008)


def test_the_best_offered_quantization_is_taken_and_doubted_unless_it_was_probed() -> None:
    """int8 halves the bytes; unprobed, its weights may lie in a cache that is faster."""
    found = bound(profile(hardware=INT8_CPU), "p99(itl)<1ms")
    assert found.value == pytest.approx(0.010)
    assert "as int8" in found.proof
    assert not found.certain
    assert "a cache holds weights so small" in found.proof
    probes = Probes(linears=[LinearProbe(method="int8", rows=[1], layers_s=[0.02], head_s=[0.0])])
    assert bound(profile(hardware=INT8_CPU, probes=probes), "p99(itl)<1ms").certain


def test_no_bound_rests_on_a_ceiling_that_a_probe_has_beaten() -> None:
    quick = LinearProbe(method="none", rows=[1, 1000], layers_s=[0.010, 0.1], head_s=[0.0, 0.0])
    probed = profile(probes=Probes(linears=[quick]))
    # The probe read the weights at 200 GB/s and multiplied at 20 Tera operations.
    assert bound(probed, "itl<1ms").value == pytest.approx(0.010)
    assert bound(probed, "ttft<1ms").value == pytest.approx(0.1)


def test_a_checkpoint_that_is_quantized_stays_as_it_is() -> None:
    stored = profile(hardware=INT8_CPU, model=model(quantization="gptq 4 bits"))
    assert bound(stored, "itl<1ms").value == pytest.approx(0.020)


def test_gpus_read_together() -> None:
    gpus = [{"compute_capability": "7.0"}, {"compute_capability": "7.0"}]
    found = bound(profile(hardware={"device": "cuda", "gpus": gpus}), "itl<1ms")
    assert found.value == pytest.approx(0.010)
    assert "2 GPUs" in found.proof


def test_a_prompt_costs_its_operations() -> None:
    found = bound(profile(inputs=spread(1000, p95=2000)), "ttft<1ms")
    assert found.value == pytest.approx(0.4)
    facts = model(attention_features=1_000_000)
    # 2000 tokens: 2e12 pairs of 2 operations for each of the million features, half of 4.
    assert bound(profile(inputs=spread(2000), model=facts), "ttft<1ms").value == pytest.approx(
        0.4 + 4 * 1e6 * 2000**2 / 2 / 10e12
    )


def test_a_short_prompt_costs_a_pass_over_the_weights() -> None:
    found = bound(profile(inputs=spread(10)), "ttft<1ms")
    assert found.value == pytest.approx(0.020)


def test_prompts_may_be_multiplied_in_the_fastest_type_on_offer() -> None:
    assert bound(profile(hardware=INT8_CPU), "ttft<1ms").value == pytest.approx(0.1)


def test_unknown_hits_make_no_proof() -> None:
    assert bound(profile(hits=0.0), "ttft<1ms").certain
    assert not bound(profile(hits=None), "ttft<1ms").certain


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("statistic", ["mean", "p50", "p90", "p95", "p99"])
def test_no_placing_of_the_hits_beats_the_bound_on_prompts(seed: int, statistic: str) -> None:
    """Whichever prompts the hits shorten, the statistic of what is left is not below the bound."""
    rng = np.random.default_rng(seed)
    lengths = np.sort(rng.lognormal(6, 1, 2000))
    rate = float(rng.uniform(0, 0.3))
    limit = f"{statistic}(ttft)<1us"
    q = [float(np.percentile(lengths, p)) for p in (50, 95, 99)]
    inputs = Spread(mean=float(lengths.mean()), p50=q[0], p95=q[1], p99=q[2], max=lengths[-1])
    found = bound(
        profile(inputs=inputs, hits=rate, model=model(weight_bytes=1, head_parameters=0)), limit
    ).value
    budget = rate * lengths.sum()
    for name in ("longest first", "shortest first", "by rank", "at random"):
        left = lengths.copy()
        order = {
            "longest first": np.arange(left.size)[::-1],
            "shortest first": np.arange(left.size),
            # Just those that decide the percentile.
            "by rank": np.argsort(np.abs(np.arange(left.size) - 0.9 * left.size)),
            "at random": rng.permutation(left.size),
        }[name]
        spent = 0.0
        for index in order:
            cut = min(left[index] - 1, budget - spent)
            left[index] -= max(0.0, cut)
            spent += max(0.0, cut)
        seconds = 2e9 * left / 10e12
        true = (
            seconds.mean() if statistic == "mean" else np.percentile(seconds, float(statistic[1:]))
        )
        assert found <= true * (1 + 1e-6), name


def test_a_whole_answer_costs_its_prompt_and_its_tokens() -> None:
    found = bound(profile(), "mean(e2e)<1ms")
    assert found.value == pytest.approx(0.2 + 99 * 0.020)
    # Which prompts the longest answers have is not known.
    assert bound(profile(outputs=spread(100, p95=200)), "e2e<1ms").value == pytest.approx(
        199 * 0.02
    )


def test_throughput_is_bounded_by_operations_or_by_what_is_asked() -> None:
    free = profile(rate=None)
    # A token and ten of a prompt: 22e9 operations.
    assert bound(free, "throughput>1tok/s").value == pytest.approx(10e12 / 22e9)
    # Half of the prompts' tokens may be found in the cache.
    cached = bound(profile(rate=None, hits=0.5), "throughput>1tok/s")
    assert cached.value == pytest.approx(10e12 / 12e9)
    # Without a word on hits, all of them may be.
    unknown = bound(profile(rate=None, hits=None), "throughput>1tok/s")
    assert unknown.value == pytest.approx(10e12 / 2e9)
    asked = bound(profile(rate=2.0), "throughput>1tok/s")
    assert asked.value == pytest.approx(200.0)
    assert "ask for 200 tok/s" in asked.proof


def test_goodput_is_bounded_by_the_share_of_prompts_that_are_short_enough() -> None:
    mixed = profile(inputs=spread(100, p95=5000))
    # Half of the prompts need 20 ms, those from the 95th percentile on a second.
    found = bound(mixed, "ttft<500ms,goodput>=0.99")
    assert found.value == pytest.approx(0.95)
    assert bound(mixed, "tpot<10ms,goodput>=0.99").value == 0.0
    slo = parse_slo("ttft<2s,goodput>=0.99")
    bounds = Bounds.of(mixed)
    assert bounds is not None
    assert bounds.of_limit(slo.limits[1], slo) is None


def test_work_above_what_the_device_does_is_told() -> None:
    bounds = Bounds.of(profile(rate=10.0))
    assert bounds is not None
    load = bounds.utilisation()
    assert load is not None
    # 1000 prompt and 100 output tokens of 2e9 operations each, ten times a second.
    assert load.value == pytest.approx(2.2)
    cached = Bounds.of(profile(rate=10.0, hits=0.5))
    assert cached is not None
    load = cached.utilisation()
    assert load is not None
    assert load.value == pytest.approx(1.2)


def test_without_a_model_or_ceilings_nothing_is_bounded() -> None:
    assert Bounds.of(profile(model=None)) is None
    assert Bounds.of(profile(ceilings=None)) is None
    assert Bounds.of(profile(ceilings=ceilings())) is not None


def test_the_bound_on_prompts_is_what_the_best_placing_of_the_hits_reaches() -> None:
    """Half of the prompts have 1000 tokens: hits level those between the median and the 95th."""
    inputs = Spread(mean=505.0, p50=1000.0, p95=1000.0, p99=1000.0, max=1000.0)
    found = bound(profile(inputs=inputs, hits=0.2, model=model(weight_bytes=1)), "ttft<1us")
    # 101 tokens a request in all, spent on 45 of 100 requests.
    assert found.value == pytest.approx(2e9 * (1000 - 101 / 0.45) / 10e12)
