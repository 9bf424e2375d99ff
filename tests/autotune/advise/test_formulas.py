"""Named formulas against independent arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from autotune.advise.formulas import FORMULAS
from autotune.advise.knob_formulas import KNOB_FORMULAS
from autotune.advise.speculation import drafts_for_load, expected_tokens, speculative_speedup
from autotune.embedded import TARGET
from autotune.predict.change import Factor
from autotune.profiling.schema import (
    Breakdown,
    Communication,
    KvCache,
    Queueing,
    Speculation,
    Spread,
)
from tests.autotune.advise import situations


def value(name: str, profile: Any = None, **arguments: float) -> Factor:
    facts = situations.facts(situations.profile() if profile is None else profile)
    found = FORMULAS[name](facts, **arguments)
    assert found is not None
    assert found.low <= found.value <= found.high
    return found


def traffic(inputs: Spread | None, outputs: Spread | None) -> dict[str, Any]:
    known = situations.profile().traffic
    return {"traffic": known.model_copy(update={"input_tokens": inputs, "output_tokens": outputs})}


def test_fewer_bits_are_read_at_best_in_proportion() -> None:
    found = value("weight_bits_ratio", bits=4.0)
    assert found.low == pytest.approx(0.25)
    assert found.high == pytest.approx(0.5)
    # gpt-fast's int8 on an A100, 1.48x, and Marlin's 3.87x at 4 bits in groups of 128 lie inside.
    assert value("weight_bits_ratio", bits=8.1).high > 1 / 1.48 > 0.5
    assert value("weight_bits_ratio", bits=4.13).low == pytest.approx(1 / 3.87, rel=0.01)


def test_memory_shrinks_by_the_linear_layers_alone() -> None:
    # 7e9 linear parameters of 2 bytes become 1 byte each; 2e9 bytes stay.
    assert value("resident_bits_ratio", bits=8).value == pytest.approx(9 / 16)


def test_a_cache_of_half_the_bytes_holds_twice_the_tokens_less_the_scales() -> None:
    # 128 elements of 8 bits and one scale of 32 bits, against 128 of 16.
    assert value("kv_capacity_ratio", bits=8).value == pytest.approx(2048 / (1024 + 32))
    assert value("kv_bits_ratio", bits=8).low == pytest.approx((1024 + 32) / 2048)


def test_freed_weights_enlarge_the_cache_of_a_gpu_only() -> None:
    on_gpu = situations.profile(situations.HOPPER)
    freed = 16e9 * (1 - 9 / 16)
    found = value("kv_capacity_of_freed_weights", on_gpu, bits=8)
    assert found.value == pytest.approx(1 + freed / (4 * situations.GIB))
    on_cpu = situations.facts(situations.profile())
    assert FORMULAS["kv_capacity_of_freed_weights"](on_cpu, bits=8) is None


def test_what_is_left_of_prompts_at_the_attainable_hit_rate() -> None:
    kv = KvCache(hit_rate=0.2, attainable_hit_rate=0.6)
    assert value("uncached_prompt", situations.profile(kv=kv)).value == pytest.approx(0.4 / 0.8)


@pytest.mark.parametrize(("ranks", "measured"), [(2, 1.61), (4, 2.42), (8, 3.13)])
def test_ranks_speed_up_as_was_measured(ranks: int, measured: float) -> None:
    assert 1 / value("ranks_device", ranks=ranks).value == pytest.approx(measured, rel=0.03)


def test_two_devices_cache_what_one_and_its_weights_take() -> None:
    weights, cache = 16e9, 4 * situations.GIB
    found = value("kv_capacity_of_ranks", ranks=2)
    assert found.value == pytest.approx((2 * (weights + cache) - weights) / cache)


def test_giving_up_ranks_is_dear_on_gpus_and_free_on_a_processor() -> None:
    assert value("ranks_given_up").value == 1.0
    on_gpu = value("ranks_given_up", situations.profile(situations.HOPPER))
    assert on_gpu.value == pytest.approx(1.61, rel=0.03)


@pytest.mark.parametrize("percentile", [50, 95, 99])
def test_clipped_answers_agree_with_clipping_the_lengths_themselves(percentile: int) -> None:
    lengths = np.random.default_rng(7).lognormal(5, 0.86, 200_000)
    quantiles = np.percentile(lengths, [50, 95, 99])
    known = Spread(
        mean=float(lengths.mean()),
        p50=float(quantiles[0]),
        p95=float(quantiles[1]),
        p99=float(quantiles[2]),
        max=float(np.percentile(lengths, 99.95)),
    )
    exact = np.minimum(lengths, np.percentile(lengths, percentile)).mean() / lengths.mean()
    found = value(
        "clipped_answers", situations.profile(**traffic(None, known)), percentile=percentile
    )
    assert found.low <= exact <= found.high


def test_more_queries_to_a_key_head_read_fewer_keys() -> None:
    assert value("shared_kv_heads", heads_per_kv_head=8).value == pytest.approx(1 / 8)
    grouped = situations.profile(model=situations.model(num_kv_heads=4))
    assert FORMULAS["shared_kv_heads"](situations.facts(grouped), heads_per_kv_head=8) is None
    few = situations.profile(model=situations.model(num_heads=6, num_kv_heads=3))
    assert value("shared_kv_heads", few, heads_per_kv_head=8).value == pytest.approx(2 / 6)


def test_a_window_reads_its_tokens_of_the_context() -> None:
    context = 20000 + 200 / 2
    assert value("kept_context", tokens=1024).value == pytest.approx(1024 / context)


def test_offloaded_weights_come_over_the_link() -> None:
    large = situations.model(resident_bytes=100 * situations.GIB)
    served = situations.profile(situations.gpu("9.0", memory=80 * situations.GIB), model=large)
    over = 28 / 100
    found = value("offloaded_reads", served, link=25e9, memory=1e12)
    assert found.value == pytest.approx(1 - over + over * 1e11 / 25e9)
    facts = situations.facts(situations.profile(situations.HOPPER))
    assert FORMULAS["offloaded_reads"](facts, link=25e9, memory=1e12) is None


def test_another_device_is_as_fast_as_four_fifths_of_its_data_sheet() -> None:
    assert value("device_bandwidth", bandwidth=1e12).value == pytest.approx(0.125)
    assert value("device_arithmetic", flops=1e14).value == pytest.approx(0.125)


def test_other_factors_are_what_the_profile_says() -> None:
    assert value("unthrottled").value == pytest.approx(0.7)
    ranks = situations.profile(communication=Communication(ranks=2, share=0.4, imbalance=0.6))
    assert value("balanced", ranks).value == pytest.approx(0.4)
    assert value("prompts_at_median", share=0.6).value == 0.6
    assert value("repeated_requests").value == pytest.approx(1 - 0.31 / 2)
    unique = situations.profile(kv=KvCache(attainable_hit_rate=0.1))
    assert value("repeated_requests", unique).low == pytest.approx(0.9)
    unexplained = [Breakdown(metric="tpot", seconds=0.1, parts={"other": 0.4, "weights": 0.6})]
    disturbed = situations.profile(breakdowns=unexplained)
    assert value("without_others", disturbed) == Factor(0.8, 0.6, 1.0)
    few = situations.profile(knobs={"num_threads": 2})
    assert value("cores_in_use", few).value == pytest.approx(2 / 8)
    # 32 layers of 12 kernels at 2 us beside 10 ms of host time.
    assert value("launches", kernels=12).value == pytest.approx(1 + 32 * 12 * 2e-6 / 0.01)
    for count, price in ((1, 2.0), (2, 1.0), (4, 1.0)):
        here = situations.profile(situations.gpu("9.0", count=count))
        assert value("price_of_gpus", here, needed=2).value == price
    priced = situations.profile(price=2.0)
    assert value("price_ratio", priced, low=1, usual=3, high=4) == Factor(1.5, 0.5, 2.0)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_formula_without_its_facts_gives_nothing(name: str) -> None:
    unknown = situations.profile(
        None,
        model=None,
        ceilings=None,
        speculation=None,
        communication=None,
        gpu=None,
        host=None,
        engine_config=None,
        kv=KvCache(),
        queueing=Queueing(),
        phases=[],
        **traffic(None, None),
    )
    arguments: Mapping[str, float] = {
        "weight_bits_ratio": {"bits": 8},
        "resident_bits_ratio": {"bits": 8},
        "kv_bits_ratio": {"bits": 8},
        "kv_capacity_ratio": {"bits": 8},
        "kv_capacity_of_freed_weights": {"bits": 8},
        "ranks_device": {"ranks": 2},
        "kv_capacity_of_ranks": {"ranks": 2},
        "clipped_answers": {"percentile": 95},
        "shared_kv_heads": {"heads_per_kv_head": 8},
        "kept_context": {"tokens": 10},
        "offloaded_reads": {"link": 1, "memory": 1},
        "device_bandwidth": {"bandwidth": 1},
        "device_arithmetic": {"flops": 1},
        "prompts_at_median": {"share": 0.5},
        "launches": {"kernels": 10},
        "price_ratio": {"low": 1, "usual": 1, "high": 1},
        "price_of_gpus": {"needed": 2},
        "drafting_by_a_model": {"drafts": 4},
    }.get(name, {})
    found = FORMULAS[name](situations.facts(unknown), **arguments)
    # How often requests repeat is known from published logs where it is not from the profile.
    assert (found is None) == (name != "repeated_requests")


def test_expected_tokens_are_leviathans_first_equation() -> None:
    for a, k in ((0.8, 5), (0.5, 3), (0.0, 4)):
        drafted = sum(a**i for i in range(k + 1))
        assert expected_tokens(a, k) == pytest.approx(drafted)
    assert expected_tokens(1.0, 4) == 5.0


def test_speculation_follows_theorem_3_8_at_low_load_and_hurts_at_high_load() -> None:
    a, k, c = 0.8, 5, 0.05
    tokens = expected_tokens(a, k)
    low = speculative_speedup(tokens, k, batch=1, critical=200, draft_cost=c)
    assert low == pytest.approx((1 - a ** (k + 1)) / ((1 - a) * (k * c + 1)))
    high = speculative_speedup(tokens, k, batch=400, critical=200, draft_cost=c)
    # There every verified token costs arithmetic: 6 rows for 3.69 tokens.
    assert high == pytest.approx(tokens / (k * c + k + 1))
    # vLLM's measured slowdowns of 1.4 to 1.8 are of this size.
    assert 1 / 1.8 < high < 1
    batches = [2.0**i for i in range(12)]
    speedups = [speculative_speedup(tokens, k, batch=b, critical=200) for b in batches]
    assert speedups == sorted(speedups, reverse=True)


def test_a_draft_model_takes_its_part_of_a_step_for_each_token() -> None:
    """The embedded draft has a tenth of its target's parameters; else Spec-Bench's is known."""
    embedded = situations.profile(
        knobs={"model": str(TARGET)}, model=situations.model(parameters=11_000_000)
    )
    share = situations.facts(embedded).number("draft_share")
    assert share == pytest.approx(0.1, abs=0.02)
    found = FORMULAS["drafting_by_a_model"](situations.facts(embedded), drafts=4)
    assert found == Factor(4 * (share + 0.03), 4 * share, 4 * (share + 0.1))
    unknown = FORMULAS["drafting_by_a_model"](situations.facts(situations.profile()), drafts=4)
    assert unknown == Factor(0.35, 0.15, 0.6)


def test_fewer_drafts_pay_at_higher_load() -> None:
    drafts = []
    for batch in (1.0, 40.0, 90.0):
        served = situations.profile(phases=[situations.phase("decode", mean_batch=batch)])
        plan = drafts_for_load(situations.facts(served))
        assert plan is not None
        drafts.append(plan.drafts)
    assert drafts == sorted(drafts, reverse=True)
    assert drafts[0] > drafts[-1]


def test_without_a_dry_run_nothing_is_known_of_drafts() -> None:
    empty = Speculation(num_requests=0, min_ngram=2, max_ngram=4, tokens_per_step={}, hit_share=0.0)
    for dry_run in (None, empty):
        facts = situations.facts(situations.profile(speculation=dry_run))
        assert drafts_for_load(facts) is None
        assert FORMULAS["drafted_tokens_per_step"](facts) is None
        assert FORMULAS["drafted_tokens_verified"](facts) is None


def test_values_of_knobs_follow_from_the_profile() -> None:
    served = situations.profile(knobs={"max_num_seqs": 32, "num_threads": 2})
    facts = situations.facts(served, slo="ttft<3s,tpot<50ms")

    def knob(name: str, of: str, by: list[float]) -> list[float]:
        return KNOB_FORMULAS[name](facts, knob=of, by=by)

    assert knob("times", "max_num_batched_tokens", [0.5, 2]) == [1024, 4096]
    # 32 ran and 20 waited: 64 is the power of two above them.
    assert knob("seats_for_demand", "max_num_seqs", [1.0]) == [64]
    assert knob("seats_that_fit", "max_num_seqs", [1.0, 0.5]) == [6, 3]
    # TPOT is twice its limit, so half of what ran.
    assert knob("seats_for_tpot", "max_num_seqs", [1.0]) == [16]
    # Where the engine keeps up, the 16 that run on average need 20 seats.
    calm = served.queueing.model_copy(update={"utilisation": 0.6})
    facts = situations.facts(served.model_copy(update={"queueing": calm}), slo="tpot<50ms")
    assert knob("seats_for_tpot", "max_num_seqs", [1.0, 1.5, 2.0]) == [20, 24]
    # The cache has 4 GiB, and 32 are free.
    growing = [2, 4, 7, 8]
    assert knob("in_free_memory", "kv_cache_memory_bytes", growing) == [
        factor * 4 * situations.GIB for factor in (2, 4, 7)
    ]
    facts = situations.facts(served, slo="ttft<3s,tpot<50ms")
    # 2 requests are served a second, and the limit leaves 3 s.
    assert knob("queue_within_limit", "max_num_queued_reqs", [1.0]) == [6]
    assert knob("all_cores", "num_threads", [1.0]) == [8]
    assert knob("times", "kv_cache_memory_bytes", [2]) == [2 * 4 * situations.GIB]
    assert math.isfinite(knob("seats_for_demand", "max_num_seqs", [0.5])[0])
