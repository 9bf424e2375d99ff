"""What a prediction is held against, and when it is held against nothing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from autotune.predict.gain import direction, same_direction
from autotune.records import TrialKind, TrialRecord
from autotune.search.scoreboard import scoreboard

DEFAULT = {"quantization": "none", "max_num_seqs": 256}
INT4 = {**DEFAULT, "quantization": "int4"}


def latency(p95: float, spread: float = 1.1) -> dict[str, Any]:
    return {
        "p95": p95,
        "mean": p95 / 2,
        "intervals": {"p95": [p95 / spread, p95 * spread], "mean": None},
    }


def trial(
    number: int,
    config: dict[str, Any],
    *,
    kind: TrialKind = "search",
    round_: int = 0,
    tpot: float = 0.04,
    **metrics: Any,
) -> TrialRecord:
    return TrialRecord(
        number=number,
        kind=kind,
        source="",
        config=config,
        outcome="ok",
        seconds=1.0,
        started_at="",
        round=round_,
        metrics={
            "tpot": latency(tpot),
            "offered_rate": 10.0,
            "requests_per_s": 5.0,
            "output_tokens_per_s": 100.0,
            "goodput_tokens_per_s": 50.0,
            **metrics,
        },
    )


def advice(
    metric: str = "tpot",
    value: float = 2.0,
    low: float = 1.5,
    high: float = 2.5,
    *,
    knobs: dict[str, Any] | None = None,
    testable: bool = True,
) -> dict[str, Any]:
    statistic = "p95" if metric in ("ttft", "tpot", "e2e") else None
    return {
        "technique": "weights-int4",
        "title": "int4 weights",
        "knobs": {"quantization": "int4"} if knobs is None else knobs,
        "testable": testable,
        "gain": {
            "metric": metric,
            "statistic": statistic,
            "value": value,
            "low": low,
            "high": high,
            "basis": "replay",
        },
    }


def only(board: dict[str, Any] | None) -> dict[str, Any]:
    assert board is not None
    (entry,) = board["entries"]
    assert isinstance(entry, dict)
    return entry


@pytest.mark.parametrize(
    ("tpot", "held", "right"), [(0.02, True, True), (0.035, False, True), (0.05, False, False)]
)
def test_a_prediction_is_a_hit_where_what_was_measured_lies_in_its_interval(
    tpot: float, held: bool, right: bool
) -> None:
    board = scoreboard([advice()], [trial(0, DEFAULT), trial(1, INT4, tpot=tpot)])
    entry = only(board)
    assert board is not None
    assert entry["measured"]["value"] == pytest.approx(0.04 / tpot)
    assert (entry["held"], entry["direction_right"]) == (held, right)
    assert entry["error"] == pytest.approx(abs(2.0 * tpot / 0.04 - 1))
    assert entry["trials"] == [1]
    assert (board["scored"], board["held"], board["held_share"]) == (1, int(held), float(held))
    assert board["median_error"] == entry["error"]


def test_the_interval_of_one_pair_covers_the_ratio_of_two_bootstrapped_values() -> None:
    # Two log-normal estimates with known standard errors: their ratio's is the root of the sum.
    sigma = math.log(1.1) / 1.96
    entry = only(scoreboard([advice()], [trial(0, DEFAULT), trial(1, INT4, tpot=0.02)]))
    rng = np.random.default_rng(3)
    ratios = 2.0 * np.exp(rng.normal(0, sigma, 200_000) - rng.normal(0, sigma, 200_000))
    low, high = np.percentile(ratios, [2.5, 97.5])
    assert entry["measured"]["low"] == pytest.approx(low, rel=0.01)
    assert entry["measured"]["high"] == pytest.approx(high, rel=0.01)


def test_rounds_of_the_proof_count_beside_the_search_trial() -> None:
    # Rounds differ in their traffic; what both saw cancels, so that each pair gives 2.
    trials = [trial(0, DEFAULT), trial(1, INT4, tpot=0.02)]
    for round_, tpot in enumerate((0.03, 0.08)):
        trials.append(trial(2 + 2 * round_, DEFAULT, kind="proof", round_=round_, tpot=tpot))
        half = trial(3 + 2 * round_, INT4, kind="proof", round_=round_, tpot=tpot / 2)
        trials.append(half)
    measured = only(scoreboard([advice()], trials))["measured"]
    assert measured["pairs"] == 3
    assert [measured[k] for k in ("low", "value", "high")] == pytest.approx([2.0, 2.0, 2.0])


def test_a_larger_throughput_is_a_gain_where_the_engine_bounds_it() -> None:
    trials = [trial(0, DEFAULT), trial(1, INT4, output_tokens_per_s=200.0)]
    entry = only(scoreboard([advice("throughput")], trials))
    assert entry["held"]
    assert entry["measured"]["value"] == pytest.approx(2.0)
    assert (entry["measured"]["low"], entry["measured"]["pairs"]) == (None, 1)


def test_throughput_that_arrivals_bound_scores_nothing() -> None:
    trials = [trial(0, DEFAULT), trial(1, INT4, requests_per_s=9.9)]
    board = scoreboard([advice("throughput")], trials)
    entry = only(board)
    assert board is not None
    assert entry["held"] is None
    assert "--rate inf" in entry["why_not"]
    assert (board["testable"], board["scored"], board["held_share"]) == (1, 0, None)
    # All at once there is no such bound.
    assert only(scoreboard([advice("throughput")], trials, at_once=True))["held"] is False


def test_goodput_is_compared_at_the_load_that_both_were_offered() -> None:
    interval = {"intervals": {"goodput_requests_per_s": [3.0, 5.0]}}
    trials = [
        trial(0, DEFAULT, goodput_requests_per_s=4.0, requests_per_s=9.9, **interval),
        trial(1, INT4, goodput_requests_per_s=8.0, requests_per_s=9.9),
    ]
    measured = only(scoreboard([advice("goodput")], trials))["measured"]
    assert (measured["value"], measured["low"]) == (pytest.approx(2.0), None)
    trials[1] = trial(1, INT4, goodput_requests_per_s=8.0, **interval)
    measured = only(scoreboard([advice("goodput")], trials))["measured"]
    assert measured["low"] < 2.0 < measured["high"]
    assert only(scoreboard([advice("goodput")], trials, capacity=True))["measured"] is None


def test_cost_follows_the_tokens_within_the_slo() -> None:
    trials = [trial(0, DEFAULT), trial(1, INT4, goodput_tokens_per_s=100.0)]
    assert only(scoreboard([advice("cost")], trials))["measured"]["value"] == pytest.approx(2.0)


def test_a_capacity_search_compares_loads_and_not_latencies() -> None:
    trials = [
        trial(0, DEFAULT, capacity_requests_per_s=3.0),
        trial(1, INT4, tpot=0.02, capacity_requests_per_s=6.0),
    ]
    assert "another load" in only(scoreboard([advice()], trials, capacity=True))["why_not"]
    entry = only(scoreboard([advice("throughput")], trials, capacity=True))
    assert entry["measured"]["value"] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("item", "tried", "why"),
    [
        (advice(), [], "not tried"),
        (advice(knobs={}), [], "default is set so"),
        (advice("memory"), [trial(1, INT4)], "do not measure memory"),
        ({**advice(), "gain": None}, [trial(1, INT4)], "no gain was predicted"),
        (
            advice(),
            [TrialRecord(1, "search", "", INT4, "crash", 1.0, "", reason="boom")],
            "trial 1 failed: boom",
        ),
        (advice(), [trial(1, INT4, tpot=0.0)], "not measured in both"),
    ],
)
def test_what_cannot_be_scored_says_why(
    item: dict[str, Any], tried: list[TrialRecord], why: str
) -> None:
    entry = only(scoreboard([item], [trial(0, DEFAULT), *tried]))
    assert why in entry["why_not"]
    assert (entry["held"], entry["measured"], entry["error"]) == (None, None, None)


def test_there_is_no_scoreboard_without_testable_advice_or_trials() -> None:
    assert scoreboard([advice(testable=False)], [trial(0, DEFAULT)]) is None
    assert scoreboard([advice()], []) is None


def test_a_gain_near_one_is_no_change() -> None:
    gains = (0.5, 0.94, 0.96, 1.0, 1.04, 1.06, 3.0)
    words = [direction(gain) for gain in gains]
    assert words == ["worse"] * 2 + ["no change"] * 3 + ["better"] * 2


@pytest.mark.parametrize(
    ("predicted", "measured", "right"),
    [
        (1.3, 1.01, True),
        (1.3, 0.99, False),
        (1.04, 0.96, True),
        (1.04, 0.94, False),
        (0.8, 0.9, True),
    ],
)
def test_a_direction_is_right_where_the_sign_is_or_neither_is_a_change(
    predicted: float, measured: float, right: bool
) -> None:
    assert same_direction(predicted, measured) is right
