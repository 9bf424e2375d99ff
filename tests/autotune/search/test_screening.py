"""Which points are thought of, and which of them are simulated."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest

from autotune.predict.cost_model import CostDraw
from autotune.predict.drafting import DraftProfile, Trace
from autotune.predict.fit import probed_cost
from autotune.search.candidates import (
    Demand,
    candidate_points,
    fastest_methods,
    neighbours,
    rough_worth,
)
from autotune.search.objective import Objective
from autotune.search.rough_drafts import RoughDrafts
from autotune.search.screening import screen
from autotune.search.space import SearchSpace
from autotune.slo import parse_slo
from engine.config import EngineConfig
from engine.engine import CacheShape
from tests.autotune.predict.played_profile import probes

BASE = EngineConfig(device="cpu", max_num_seqs=64, max_num_batched_tokens=2048)
SPACE = SearchSpace(
    {
        "quantization": ("none", "int8", "llm_int8", "int4", "gptq"),
        "kv_cache_dtype": ("auto", "int8"),
        "block_size": (8, 16, 32),
        "max_num_seqs": (4, 16, 64, 256),
        "max_num_batched_tokens": (64, 512, 2048),
        "long_prefill_token_threshold": (0, 64, 256),
        "enable_prefix_caching": (True, False),
        "scheduling_policy": ("fcfs", "sjf"),
    }
)
METHODS = ("none", "int8", "int4")


def test_all_points_of_a_small_space_that_the_engine_accepts() -> None:
    space = SearchSpace({n: SPACE.values[n] for n in ("max_num_seqs", "max_num_batched_tokens")})
    found = candidate_points(space, BASE, METHODS, 100, 0)
    accepted = [(s, t) for s, t in itertools.product((4, 16, 64, 256), (64, 512, 2048)) if s <= t]
    assert [(p["max_num_seqs"], p["max_num_batched_tokens"]) for p in found] == accepted


def test_of_a_large_space_every_strong_combination_and_drawn_points() -> None:
    found = candidate_points(SPACE, BASE, METHODS, 1500, 0)
    assert len(found) == 1500
    assert len({str(sorted(p.items())) for p in found}) == 1500
    assert {p["quantization"] for p in found} == set(METHODS)
    strong = ("quantization", "kv_cache_dtype", "max_num_seqs", "max_num_batched_tokens")
    # 256 sequences have no room in 64 tokens.
    assert len({tuple(p[n] for n in strong) for p in found}) == 3 * 2 * (4 * 3 - 1)
    assert candidate_points(SPACE, BASE, METHODS, 1500, 0) == found


def test_of_each_speed_the_method_without_calibration_stands_for_all() -> None:
    values = SPACE.values["quantization"]
    assert fastest_methods(values, "none") == ["none", "int8", "int4"]
    assert fastest_methods(values, "gptq") == ["none", "int8", "gptq"]
    assert fastest_methods(values, "none", ["int4", "int8"]) == ["none", "llm_int8", "gptq"]


def test_neighbours_differ_in_one_knob_and_numbers_by_one_place() -> None:
    start = SPACE.point_of(BASE)
    assert start is not None
    found = neighbours(SPACE, BASE, start, METHODS)
    for point in found:
        (name,) = [n for n in point if point[n] != start[n]]
        if SPACE.is_ordinal(name):
            places = SPACE.values[name].index(point[name]), SPACE.values[name].index(start[name])
            assert abs(places[0] - places[1]) == 1
    assert {p["max_num_seqs"] for p in found} == {16, 64, 256}


SPECULATIVE = SearchSpace(
    {
        **SPACE.values,
        "speculative_method": ("none", "ngram", "suffix"),
        "num_speculative_tokens": (2, 4, 8),
    }
)


def test_no_two_points_are_the_same_engine() -> None:
    small = SearchSpace(
        {n: SPECULATIVE.values[n] for n in ("speculative_method", "num_speculative_tokens")}
    )
    assert len(candidate_points(small, BASE, METHODS, 100, 0)) == 1 + 2 * 3 == small.size
    found = candidate_points(SPECULATIVE, BASE, METHODS, 3000, 0)
    configs = {str(SPECULATIVE.config_of(point, BASE)) for point in found}
    assert len(configs) == len(found) == 3000
    start = SPECULATIVE.point_of(BASE)
    assert start is not None
    around = neighbours(SPECULATIVE, BASE, start, METHODS)
    assert all(p["num_speculative_tokens"] == 4 for p in around)
    drafting = {**start, "speculative_method": "ngram"}
    moved = neighbours(SPECULATIVE, BASE, drafting, METHODS)
    lengths = [p["num_speculative_tokens"] for p in moved]
    assert {2, 8} < set(lengths)


def test_of_too_many_strong_combinations_all_values_have_some() -> None:
    found = candidate_points(SPECULATIVE, BASE, METHODS, 100, 0)
    assert len(found) == 100
    for name, values in SPECULATIVE.values.items():
        offered = METHODS if name == "quantization" else values
        assert {point[name] for point in found} == set(offered)


def worth(point: Any) -> float:
    """Best at 16 sequences with int8, by far; blocks and order matter a little."""
    far = abs(math.log2(point["max_num_seqs"] / 16)) + 2 * (point["quantization"] != "int8")
    far += 0.3 * (point["block_size"] != 32) + 0.2 * (point["scheduling_policy"] != "sjf")
    return -far - 0.1 * point["enable_prefix_caching"]


def test_the_best_is_found_with_few_simulations_by_moving_on_from_good_ones() -> None:
    calls: list[Any] = []

    def simulated(point: Any) -> float:
        calls.append(point)
        return worth(point)

    def rough(point: Any) -> float | None:
        return -abs(math.log2(point["max_num_seqs"] / 16))  # of weights it knows nothing

    found = screen(SPACE, BASE, METHODS, rough, simulated, 120, 0)
    assert found.considered == 3 * 2 * 3 * 11 * 3 * 2 * 2  # all: there are no more
    assert len(calls) <= 120
    assert worth(found.points[0]) == max(
        map(worth, candidate_points(SPACE, BASE, METHODS, 10**6, 0))
    )
    assert [worth(p) for p in found.points] == sorted(map(worth, found.points), reverse=True)


def test_what_cannot_be_simulated_is_left_out_and_counted() -> None:
    def rough(point: Any) -> float | None:
        return None if point["quantization"] == "int4" else 0.0

    def simulated(point: Any) -> float | None:
        return None if point["quantization"] == "int4" else worth(point)

    found = screen(SPACE, BASE, METHODS, rough, simulated, 50, 0)
    assert found.unknown > 500
    assert all(p["quantization"] != "int4" for p in found.points)


def cost_of(config: EngineConfig) -> CostDraw:
    return CostDraw(probed_cost(probes(), config.quantization, config.kv_cache_dtype))


@pytest.mark.parametrize("rate", [None, 2.0])
def test_arithmetic_prefers_faster_weights_and_batches_within_the_limit(
    rate: float | None,
) -> None:
    demand = Demand(200, 100.0, 60.0, rate)
    cache = CacheShape(100_000, 2048)

    def rough(limit: str, **knobs: Any) -> float:
        config = BASE.replace(**knobs)
        return rough_worth(
            *(demand, config, cost_of(config), cache, parse_slo(limit)),
            *(Objective("throughput"), RoughDrafts()),
        )

    assert rough("tpot<1s", quantization="int8") >= rough("tpot<1s")
    if rate is None:
        assert rough("tpot<1s", max_num_seqs=64) > rough("tpot<1s", max_num_seqs=4)
        assert rough("tpot<6ms", max_num_seqs=64) < rough("tpot<6ms", max_num_seqs=4)


def drafted_worth(
    sequences: int, tokens: int, share: float = 1.0, *, adaptive: bool = True
) -> float:
    config = BASE.replace(
        max_num_seqs=sequences,
        speculative_method="ngram",
        num_speculative_tokens=tokens,
        speculative_adaptive=adaptive,
    )
    draw = dataclasses.replace(cost_of(config), drafts=DraftProfile((0.8,), share=share))
    return rough_worth(
        *(Demand(200, 50.0, 60.0, None), config, draw, CacheShape(100_000, 2048)),
        *(parse_slo("tpot<1s"), Objective("throughput"), RoughDrafts()),
    )


def plain_worth(sequences: int) -> float:
    config = BASE.replace(max_num_seqs=sequences)
    return rough_worth(
        *(Demand(200, 50.0, 60.0, None), config, cost_of(config), CacheShape(100_000, 2048)),
        *(parse_slo("tpot<1s"), Objective("throughput"), RoughDrafts()),
    )


def test_arithmetic_knows_that_drafts_pay_while_a_step_has_room_for_their_rows() -> None:
    assert drafted_worth(1, 4) > 1.5 * plain_worth(1)
    assert drafted_worth(1, 4, share=0.3) < drafted_worth(1, 4)
    # A full batch is bound by arithmetic, to which every draft adds.
    assert drafted_worth(256, 8, adaptive=False) < plain_worth(256)
    assert drafted_worth(256, 8) >= plain_worth(256)
    assert drafted_worth(1, 1) < drafted_worth(1, 4)


def test_what_drafts_yield_is_counted_in_what_was_recorded() -> None:
    profile = DraftProfile(traces={"a": Trace((3, -1, 0)), "b": Trace((1, -1, 2, 2))})
    config = BASE.replace(speculative_method="ngram", num_speculative_tokens=2)
    none, one, two = RoughDrafts().depths(config, profile)
    assert (none.tokens, none.drafted, none.yielded) == (0, 0.0, 1.0)
    # Five of seven decodes find something; 4 of the first drafts are right, 3 of the second.
    assert (one.drafted, one.yielded) == pytest.approx((5 / 7, 1 + 4 / 7))
    assert (two.drafted, two.yielded) == pytest.approx((10 / 7, 1 + (4 + 3) / 7))
    fixed = RoughDrafts().depths(config.replace(speculative_adaptive=False), profile)
    assert fixed == [two]
    assert RoughDrafts().depths(BASE, None) == [none]
