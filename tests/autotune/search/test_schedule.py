from __future__ import annotations

import pytest

from autotune.errors import BadInput
from autotune.search.schedule import MIN_WINDOW_S, plan_schedule


def test_shares_of_a_budget_add_up_to_no_more_than_it() -> None:
    schedule = plan_schedule(240.0, None, probes=1, rounds=4, finalists=2)
    assert schedule.window_s >= MIN_WINDOW_S
    assert schedule.proof_s + schedule.search_time_left(0.0) == pytest.approx(240.0)
    assert schedule.search_time_left(0.0) / schedule.trial_s > 10


def test_given_window_is_kept() -> None:
    assert plan_schedule(600.0, 17.0, 1, 4, 2).window_s == 17.0


def test_longer_budget_buys_longer_windows() -> None:
    short, long = (plan_schedule(b, None, 1, 4, 2).window_s for b in (240.0, 1800.0))
    assert short < long


def test_no_budget_leaves_the_search_unbounded() -> None:
    assert plan_schedule(None, None, 1, 4, 2).search_time_left(1e9) == float("inf")


@pytest.mark.parametrize("budget", [1.0, 30.0])
def test_budget_too_small_says_what_would_do(budget: float) -> None:
    with pytest.raises(BadInput, match=r"need (\d+)s") as error:
        plan_schedule(budget, 10.0, 1, 4, 2)
    needed = float(str(error.value).split("need ")[1].split("s;")[0])
    plan_schedule(needed + 1, 10.0, 1, 4, 2)


def test_capacity_trials_cost_their_probes() -> None:
    one, five = (plan_schedule(None, 10.0, probes, 4, 2).trial_s for probes in (1, 5))
    assert five == 5 * one
