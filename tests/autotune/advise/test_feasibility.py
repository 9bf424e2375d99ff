"""Limits that cannot be met, with proof or without, and what would be enough instead."""

from __future__ import annotations

import math
from typing import Any

import pytest

from autotune.advise.advice import Infeasible
from autotune.advise.feasibility import infeasible_limits
from autotune.advise.limit_words import rounded_outward
from autotune.profiling.schema import Profile, Source
from autotune.slo import parse_slo
from tests.autotune.advise.feasibility_profiles import Oracle, advice, profile


def linear(knobs: dict[str, Any], load: float, length: float) -> float:
    """500 ms, less with `max_num_seqs`, in proportion to load and prompts."""
    return 0.5 * load * length / (1.25 if "max_num_seqs" in knobs else 1.0)


def only(found: tuple[Infeasible, ...]) -> Infeasible:
    assert len(found) == 1
    return found[0]


def relaxed(of: Infeasible, kind: str) -> Any:
    return next((r for r in of.relaxations if r.kind == kind), None)


def test_a_limit_below_the_bound_is_proven_infeasible() -> None:
    found = only(
        infeasible_limits(profile({"tpot": 0.030}), parse_slo("tpot<200us"), Oracle(linear), ())
    )
    assert found.proven
    assert found.limit == "tpot<200us"
    assert found.bound == pytest.approx(0.0205)
    assert found.asked == 0.0002
    assert "cannot be met here" in found.proof
    assert "of weights" in found.proof


def test_a_limit_that_drafts_nobody_knows_could_meet_is_not_proven_infeasible() -> None:
    found = only(
        infeasible_limits(profile({"tpot": 0.030}), parse_slo("tpot<10ms"), Oracle(linear), ())
    )
    assert not found.proven
    assert "can hardly be met here" in found.proof
    assert "unless a step yields several" in found.proof


def test_a_bound_that_rests_on_what_was_not_measured_is_no_proof() -> None:
    given = profile({"ttft": 0.5}, hits=None)
    found = only(infeasible_limits(given, parse_slo("ttft<10ms"), Oracle(linear), ()))
    assert not found.proven
    assert "can hardly be met here" in found.proof
    assert "is not known" in found.proof


def test_a_bound_within_the_ceilings_uncertainty_proves_nothing() -> None:
    found = only(
        infeasible_limits(profile({"tpot": 0.030}), parse_slo("tpot<20ms"), Oracle(linear), ())
    )
    assert not found.proven
    assert "is not met" in found.proof
    assert "the device itself allows 20.5 ms" in found.proof


def test_what_is_met_is_not_listed_even_if_a_bound_says_no() -> None:
    slo = parse_slo("tpot<10ms")
    assert infeasible_limits(profile({"tpot": 0.009}), slo, Oracle(linear), ()) == ()


def test_what_advice_is_predicted_to_meet_is_not_listed() -> None:
    slo = parse_slo("ttft<420ms")
    helps = [advice("seats", 1.25, knobs={"max_num_seqs": 64})]
    measured = profile({"ttft": 0.5})
    assert infeasible_limits(measured, slo, Oracle(linear), helps) == ()
    found = only(infeasible_limits(measured, slo, Oracle(linear), ()))
    assert not found.proven
    assert "measured 500 ms, and nothing that can be set here" in found.proof
    found = only(infeasible_limits(measured, slo, Oracle(linear), (), searched=True))
    assert "measured 500 ms, the best of what was tried" in found.proof


def test_what_two_pieces_of_advice_meet_together_is_not_listed() -> None:
    def both(knobs: dict[str, Any], load: float, length: float) -> float:
        return (
            0.5 / (1.25 if "max_num_seqs" in knobs else 1) / (1.25 if "block_size" in knobs else 1)
        )

    pair = [
        advice("seats", 1.25, knobs={"max_num_seqs": 64}),
        advice("blocks", 1.25, knobs={"block_size": 32}),
    ]
    measured, slo = profile({"ttft": 0.5}), parse_slo("ttft<350ms")
    assert infeasible_limits(measured, slo, Oracle(both), pair) == ()
    assert len(infeasible_limits(measured, slo, Oracle(both), pair[:1])) == 1


def test_a_knob_that_the_predictor_cannot_judge_counts_by_its_advice() -> None:
    """The threads' gain of 1.25 is known only from the table; the seats' is predicted."""
    given = [
        advice("threads", 1.25, knobs={"num_threads": 8}),
        advice("seats", 1.25, knobs={"max_num_seqs": 64}),
    ]
    measured = profile({"ttft": 0.5})
    assert infeasible_limits(measured, parse_slo("ttft<330ms"), Oracle(linear), given) == ()
    found = only(infeasible_limits(measured, parse_slo("ttft<240ms"), Oracle(linear), given))
    # 500 ms come to 320 with both; of the load three quarters are left.
    assert "the best that is predicted is 320 ms" in found.proof
    step = relaxed(found, "load")
    assert step.low < 0.75 <= step.high
    assert relaxed(found, "limit").high == pytest.approx(0.32 / 0.9)


def test_every_relaxation_is_quantified_and_the_cheapest_comes_first() -> None:
    """TTFT is 500 ms, 400 with the knob, in proportion to load and prompts; 300 is asked for."""
    given = [
        advice("another-gpu", 2.0, effort="buy"),
        advice("seats", 1.25, knobs={"max_num_seqs": 64}),
        advice("distillation", 1.8, effort="train"),
        advice("useless", 1.01, effort="deploy"),
    ]
    found = only(
        infeasible_limits(profile({"ttft": 0.5}), parse_slo("ttft<300ms"), Oracle(linear), given)
    )
    assert [r.kind for r in found.relaxations] == [
        "limit",
        "load",
        "lengths",
        "technique",
        "technique",
    ]
    limit = relaxed(found, "limit")
    assert limit.low == pytest.approx(0.5 / 1.375)
    assert limit.high == pytest.approx(0.5 / 1.125)
    assert limit.value == pytest.approx(0.45)
    assert "a limit of 450 ms" in limit.sentence
    assert "comes to 400 ms" in limit.sentence
    for kind in ("load", "lengths"):
        step = relaxed(found, kind)
        assert step.low < 0.75 <= step.high
        assert step.high - step.low < 0.04
        assert step.value == step.low
    assert "less load with Use seats" in relaxed(found, "load").sentence
    techniques = [r.technique for r in found.relaxations if r.kind == "technique"]
    assert techniques == ["distillation", "another-gpu"]
    assert relaxed(found, "technique").value == pytest.approx(0.5 / 1.8)
    assert "cannot be tested here" in relaxed(found, "technique").sentence


def test_a_relaxed_limit_is_one_that_the_bound_allows() -> None:
    """What is predicted lies below the bound; the bound is to be believed."""
    low = Oracle(lambda *_: 0.05)
    found = only(infeasible_limits(profile(None), parse_slo("ttft<40ms"), low, ()))
    assert found.proven
    assert relaxed(found, "limit").value >= 0.2


def test_requests_that_do_not_finish_have_no_weaker_limit_but_less_load() -> None:
    def overloaded(knobs: dict[str, Any], load: float, length: float) -> float | None:
        return math.inf if load > 0.5 else 0.1

    found = only(
        infeasible_limits(profile({"ttft": None}), parse_slo("ttft<300ms"), Oracle(overloaded), ())
    )
    assert "requests did not finish" in found.proof
    assert relaxed(found, "limit") is None
    assert relaxed(found, "load").low == pytest.approx(0.5, abs=0.04)


def test_predictions_are_taken_relative_to_what_was_measured() -> None:
    """A predictor that is wrong by a factor of two is right about changes."""
    halved = Oracle(lambda knobs, load, length: linear(knobs, load, length) / 2)
    slo = parse_slo("ttft<300ms")
    right = only(infeasible_limits(profile({"ttft": 0.5}), slo, Oracle(linear), ()))
    wrong = only(infeasible_limits(profile({"ttft": 0.5}), slo, halved, ()))
    assert relaxed(wrong, "load").low == relaxed(right, "load").low


def test_work_beyond_the_device_proves_that_queues_grow() -> None:
    found = only(
        infeasible_limits(
            profile({"ttft": 5.0}, rate=20.0), parse_slo("ttft<1s"), Oracle(linear), ()
        )
    )
    assert found.proven
    assert "cannot be met for long" in found.proof
    assert "billion operations" in found.proof


def test_a_throughput_that_nobody_asks_for_is_proven_infeasible() -> None:
    given = profile({"output_tokens_per_s": 95.0})
    found = only(infeasible_limits(given, parse_slo("throughput>500tok/s"), Oracle(linear), ()))
    assert found.proven
    assert found.bound == pytest.approx(100.0)
    assert "no server gives more" in found.proof


def test_goodput_follows_from_the_limits_of_each_request() -> None:
    given = profile({"tpot": 0.03, "slo_attainment": 0.0})
    slo = parse_slo("tpot<200us,goodput>=0.9")
    tpot, goodput = infeasible_limits(given, slo, Oracle(linear), ())
    assert tpot.metric == "tpot"
    assert goodput.proven
    assert goodput.bound == 0.0
    assert "at most 0% of the requests" in goodput.proof


def test_without_anything_but_a_measurement_the_limit_is_still_told() -> None:
    given: Profile = profile({"ttft": 0.5}, model=None)
    found = only(infeasible_limits(given, parse_slo("ttft<300ms"), None, ()))
    assert not found.proven
    assert found.bound is None
    assert [r.kind for r in found.relaxations] == ["limit"]


def test_limits_on_quality_and_no_slo_are_no_matter_of_feasibility() -> None:
    given = profile({"ttft": 0.5})
    assert infeasible_limits(given, parse_slo("quality_loss<1%"), Oracle(linear), ()) == ()
    assert infeasible_limits(given, None, Oracle(linear), ()) == ()


def test_few_predictions_are_asked_for() -> None:
    oracle = Oracle(linear)
    infeasible_limits(profile({"ttft": 0.5}), parse_slo("ttft<300ms"), oracle, ())
    assert oracle.asked <= 16


@pytest.mark.parametrize(
    ("slo", "value", "expected"),
    [
        ("ttft<1s", 0.3012, 0.31),
        ("ttft<1s", 0.31, 0.31),
        ("ttft<1s", 1.23, 1.3),
        ("throughput>1tok/s", 128.0, 120.0),
        ("goodput>0.5", 0.847, 0.84),
    ],
)
def test_a_relaxed_limit_is_rounded_to_the_side_that_is_met(
    slo: str, value: float, expected: float
) -> None:
    assert rounded_outward(parse_slo(slo).limits[0], value) == pytest.approx(expected)


def test_what_a_watched_server_does_not_tell_is_no_miss() -> None:
    given = profile({"ttft": None}, source=Source(kind="metrics"))
    assert infeasible_limits(given, parse_slo("ttft<1us"), Oracle(linear), ()) == ()
