"""Counts of speculation by hand, and intervals that hold what they promise."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from autotune.speculation_counts import (
    SpeculationTotals,
    accepted_share,
    design_effects,
    ratio_margin,
    speculation_metrics,
)
from engine.config import EngineConfig
from tests.autotune.drafted_steps import drafted_load, drafted_step
from tests.autotune.profiling.loads import step

NGRAM = EngineConfig(model="test", speculative_method="ngram")


def test_steps_are_added_up() -> None:
    totals = SpeculationTotals()
    totals.count(step(0.0, 0.4, 0.1, prefill_tokens=9))
    totals.count(drafted_step(1.0, 0.3, 3, [2, 3], [1, 3], host=0.2, draft_seconds=0.125))
    totals.count(drafted_step(2.0, 0.5, 2, [1], [0]))
    found = totals.to_metrics()
    assert found["decodes"] == 5
    assert found["drafted_decodes"] == 3
    assert found["hit_share"] == 3 / 5
    assert (found["drafted_tokens"], found["accepted_tokens"]) == (6, 4)
    assert found["acceptance_rate"] == pytest.approx(4 / 6)
    assert found["verified_tokens"] == pytest.approx(6 / 5)
    assert found["tokens_per_step"]["value"] == pytest.approx(1 + 4 / 5)
    assert found["draft_seconds"] == 0.125
    assert found["draft_time_share"] == pytest.approx(0.125 / 1.5)
    counts = [(p["position"], p["drafted"], p["accepted"]) for p in found["positions"]]
    assert counts == [(1, 3, 2), (2, 2, 1), (3, 1, 1)]
    # The tokens are the model's own and the accepted ones of every position.
    assert 1 + sum(c[2] for c in counts) / 5 == found["tokens_per_step"]["value"]


def test_where_nothing_is_drafted_a_step_yields_a_token() -> None:
    found = speculation_metrics([step(0.0, decode_sequences=4)], NGRAM)
    assert found is not None
    assert found["tokens_per_step"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert found["acceptance_rate"] is None
    assert (found["positions"], found["loads"]) == ([], [])
    assert accepted_share(0, 0) is None


def test_without_speculation_or_steps_there_is_nothing_to_tell() -> None:
    steps = drafted_load(10)
    assert speculation_metrics(steps, EngineConfig(model="test")) is None
    assert speculation_metrics([], NGRAM) is None


def test_few_steps_promise_nothing() -> None:
    found = speculation_metrics(drafted_load(3, k=3, chance=0.5, hit=1.0), NGRAM)
    assert found is not None
    tokens = found["tokens_per_step"]
    assert (tokens["low"], tokens["high"]) == (1.0, 4.0)


@pytest.mark.parametrize("stay", [0.0, 0.9])
def test_intervals_hold_the_truth_nineteen_times_in_twenty(stay: float) -> None:
    chance, k, hit = 0.6, 3, 0.8
    at_second = chance if stay else chance**2
    tokens = 1 + hit * (k * chance if stay else chance + chance**2 + chance**3)
    held = {"share": 0, "tokens": 0}
    loads = 120
    for seed in range(loads):
        steps = drafted_load(600, k=k, chance=chance, hit=hit, stay=stay, seed=seed)
        found = speculation_metrics(steps, NGRAM)
        assert found is not None
        share, got = found["positions"][1]["share"], found["tokens_per_step"]
        held["share"] += share["low"] <= at_second <= share["high"]
        held["tokens"] += got["low"] <= tokens <= got["high"]
    # Binomial: fewer than 105 of 120 would be one in a thousand at 95%; runs cost a little.
    assert min(held.values()) >= (105 if not stay else 98), held


def test_throws_of_a_coin_have_no_design_effect_and_runs_have() -> None:
    independent = design_effects(drafted_load(3000, chance=0.5, hit=1.0, seed=1))
    assert len(independent) == 3
    assert all(1.0 <= effect < 2.5 for effect in independent)
    runs = design_effects(drafted_load(3000, chance=0.5, hit=1.0, stay=0.9, seed=1))
    # A state that stays with 0.9 has (1 + 0.9) / (1 - 0.9) = 19 times the variance.
    assert runs[0] == pytest.approx(19, rel=0.6)


def test_all_right_is_not_certainty() -> None:
    found = speculation_metrics(drafted_load(50, chance=1.0, hit=1.0), NGRAM)
    assert found is not None
    share = found["positions"][0]["share"]
    assert share["value"] == share["high"] == 1.0
    # The rule of three for 50 throws, within what Wilson's interval differs from it.
    assert share["low"] == pytest.approx(1 - 3.84 / 53.84, abs=1e-3)


def test_a_ratios_margin_is_the_spread_of_its_estimates() -> None:
    rng = np.random.default_rng(5)

    def draw() -> tuple[float, float]:
        wholes = rng.integers(1, 5, 900).astype(np.float64)
        parts = rng.binomial(wholes.astype(np.int64), 0.3).astype(np.float64)
        margin = ratio_margin(parts, wholes)
        assert margin is not None
        return float(parts.sum() / wholes.sum()), margin

    ratios, margins = zip(*(draw() for _ in range(300)), strict=True)
    assert np.mean(margins) == pytest.approx(1.96 * np.std(ratios), rel=0.15)
    assert ratio_margin(np.ones(3), np.ones(3)) is None
    assert ratio_margin(np.zeros(0), np.zeros(0)) is None


def test_depths_that_differ_from_step_to_step_are_added_by_place() -> None:
    steps = [drafted_step(float(i), 0.1, 1, [1 + i % 4], [i % 2]) for i in range(40)]
    found = speculation_metrics(steps, NGRAM)
    assert found is not None
    assert [p["drafted"] for p in found["positions"]] == [40, 30, 20, 10]
    assert [p["accepted"] for p in found["positions"]] == [20, 0, 0, 0]
    for position in found["positions"]:
        assert position["share"]["low"] <= position["share"]["value"] <= position["share"]["high"]
    # Of trees more tokens are verified than there are places.
    wide = dataclasses.replace(steps[0], drafted_tokens=9)
    found = speculation_metrics([wide], NGRAM)
    assert found is not None
    assert found["verified_tokens"] == 9
