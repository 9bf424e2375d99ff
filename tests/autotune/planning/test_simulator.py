"""Replicas that start in the middle of their traffic, and what they correct of the arithmetic."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from autotune.hardware.catalogue import load_catalogue
from autotune.metrics import compute_metrics
from autotune.planning.candidates import Candidate, Choice, candidates
from autotune.planning.estimate import Arithmetic, Estimate
from autotune.planning.planned_traffic import PlannedTraffic, plan_traffic
from autotune.planning.simulator import Simulator, blended
from autotune.planning.trial import COUNTED, Stage
from autotune.predict.cost_model import CostDraw
from autotune.predict.replay import replay
from autotune.slo import parse_slo
from autotune.traffic_options import TrafficOptions
from tests.autotune.planning import known_models as models
from tests.autotune.planning.known_models import known
from tests.autotune.planning.linear_cost import LinearCost, LinearModel

SLO = parse_slo("ttft<400ms,tpot<25ms")
COST = LinearCost(0.008, 2.5e-5, 2e-8)


@pytest.fixture(scope="module")
def traffic() -> PlannedTraffic:
    options = TrafficOptions(source="summarize", rate=40.0)
    return plan_traffic(options, Path(__file__), 8192, sticky=False, seed=1)


@pytest.fixture(scope="module")
def candidate(traffic: PlannedTraffic) -> Candidate:
    choice = Choice(load_catalogue().find("h100"), 1, "none", "auto")
    return candidates(known(models.LLAMA_3_8B), choice, 8192, traffic.sample)[0]


@pytest.fixture
def estimate(traffic: PlannedTraffic, candidate: Candidate) -> Estimate:
    arithmetic = Arithmetic(traffic.sample, SLO, traffic.rate, traffic.burstiness)
    (found,) = arithmetic.estimates([[candidate]], [LinearModel(COST)])
    arithmetic.draw([found], 8, seed=0)
    return found


def test_a_replica_in_the_middle_of_its_traffic_is_as_one_that_ran_long(
    traffic: PlannedTraffic, candidate: Candidate, estimate: Estimate
) -> None:
    rate = 0.75 * estimate.capacity
    assert candidate.cache is not None
    stage = Stage(candidate.config, candidate.cache, traffic, traffic.sample, SLO)
    short = [
        stage.run(CostDraw(COST), rate, 1, estimate.at(rate), draw).metrics for draw in range(4)
    ]
    requests = traffic.stream(rate, 3000, 1, 77)
    whole = replay(requests, candidate.config, COST, candidate.cache, drain_limit=1e4)
    steady = compute_metrics(
        whole.records[1000:2500],
        SLO,
        config=candidate.config,
        load_delivered=True,
        load_note=None,
        resamples=0,
    )
    for metric in ("tpot", "e2e"):
        found = np.mean([m[metric]["mean"] for m in short if m is not None])
        assert found == pytest.approx(steady[metric]["mean"], rel=0.08)


@pytest.mark.parametrize(
    ("slo", "times"), [("ttft<400ms", 1), ("mean(ttft)<400ms", 1), ("ttft<1s,p99(tpot)<25ms", 2)]
)
def test_rare_percentiles_are_judged_by_more_requests(
    traffic: PlannedTraffic, candidate: Candidate, estimate: Estimate, slo: str, times: int
) -> None:
    rate = 0.5 * estimate.capacity
    assert candidate.cache is not None
    stage = Stage(candidate.config, candidate.cache, traffic, traffic.sample, parse_slo(slo))
    trial = stage.run(CostDraw(COST), rate, 1, estimate.at(rate), 0)
    assert trial.metrics is not None
    assert trial.metrics["completed"] == times * COUNTED


def test_requests_that_pile_up_end_the_trial(
    traffic: PlannedTraffic, candidate: Candidate, estimate: Estimate
) -> None:
    assert candidate.cache is not None
    stage = Stage(candidate.config, candidate.cache, traffic, traffic.sample, SLO)
    rate = 20 * estimate.capacity
    trial = stage.run(CostDraw(COST), rate, 1, estimate.at(0.9 * estimate.capacity), 0)
    assert trial.metrics is None
    assert trial.violation > 0


def test_simulation_finds_where_the_slo_stops_being_met(
    traffic: PlannedTraffic, candidate: Candidate, estimate: Estimate
) -> None:
    Simulator(traffic, SLO, traffic.rate, 8, 0).correct(estimate)
    assert estimate.simulated
    carried = estimate.capacity * estimate.correction
    assert candidate.cache is not None
    stage = Stage(candidate.config, candidate.cache, traffic, traffic.sample, SLO)
    expected = estimate.at(0.95 * estimate.capacity)
    below = [stage.run(CostDraw(COST), 0.8 * carried, 1, expected, d) for d in range(2, 5)]
    above = [stage.run(CostDraw(COST), 1.25 * carried, 1, expected, d) for d in range(2, 5)]
    assert sum(trial.violation <= 0 for trial in below) >= 2
    assert sum(trial.violation > 0 for trial in above) >= 2


def test_the_fewest_replicas_are_found_and_more_are_likelier(estimate: Estimate) -> None:
    rate = 7.3 * estimate.capacity
    needed = estimate.replicas(rate, 0.9)
    assert needed is not None
    assert estimate.chance(rate, needed) >= 0.9 > estimate.chance(rate, needed - 1)
    assert estimate.sustained(needed, 0.9) >= rate
    assert estimate.sustained(needed - 1, 0.9) < rate
    capacity = estimate.capacities()
    assert capacity.low < capacity.value < capacity.high


def test_what_no_draw_can_do_no_number_of_replicas_does(estimate: Estimate) -> None:
    estimate.drawn = (0.0,) * 4 + (1.0,) * 4
    assert estimate.replicas(1.0, 0.9) is None
    assert estimate.replicas(1.0, 0.5) is not None


def test_confirmed_draws_stand_for_all_and_move_the_chance(
    traffic: PlannedTraffic, estimate: Estimate
) -> None:
    simulator = Simulator(traffic, SLO, traffic.rate, 8, 0)
    easy = max(1, math.ceil(traffic.rate / (0.4 * estimate.capacity)))
    trials = simulator.confirm(estimate, easy, 3)
    assert all(trial.violation <= 0 for trial in trials)
    assert blended(estimate, traffic.rate, easy, trials) >= estimate.chance(traffic.rate, easy)
    # Slower draws answer slower.
    times = [trial.metrics["tpot"]["mean"] for trial in trials if trial.metrics is not None]
    assert times == sorted(times, reverse=True)
