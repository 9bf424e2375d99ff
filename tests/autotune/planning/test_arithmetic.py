"""The steady state of a replica, against closed forms that are written out here."""

from __future__ import annotations

import math

import numpy as np
import pytest

from autotune.planning.arithmetic import HOPELESS, Replicas, log_shortfall
from autotune.planning.step_table import StepTables, StepWorks
from autotune.slo import parse_slo
from engine.block_groups import ONE_GROUP
from tests.autotune.planning.linear_cost import LinearCost, even_sample


def replicas(
    *costs: LinearCost, inputs: int = 100, outputs: int = 101, seats: float = 256
) -> Replicas:
    sample = even_sample(inputs, outputs)
    works = [StepWorks(2048, ONE_GROUP, sample) for _ in costs]
    tables = [work.table(cost) for work, cost in zip(works, costs, strict=True)]
    count = len(costs)
    return Replicas(StepTables.stack(tables, works), sample, np.full(count, seats), np.ones(count))


def test_batch_follows_littles_law_where_steps_take_constant_time() -> None:
    # T = 10 ms whatever the batch; an answer decodes 100 steps: B = 8 * 100 * 0.01.
    state = replicas(LinearCost(0.01)).at(np.array([8.0]))
    assert state.batch[0] == pytest.approx(8.0, rel=5e-3)
    assert state.tpot[0].mean() == pytest.approx(0.01, rel=0.02)
    assert not state.saturated[0]


def test_batch_solves_the_fixed_point_where_steps_grow_with_it() -> None:
    # T(B) = a + b (1 + B) and prompts cost b a token: tpot = T / (1 - r b 100).
    a, b, rate = 0.01, 1e-4, 8.0
    state = replicas(LinearCost(a, b)).at(np.array([rate]))
    share = rate * b * 100
    batch = 0.0
    for _ in range(500):
        batch = rate * 100 * (a + b * (1 + batch)) / (1 - share)
    assert state.batch[0] == pytest.approx(batch, rel=0.01)


def test_prompts_wait_as_in_the_pollaczek_khinchine_formula() -> None:
    # One token out: nothing decodes, and equal prompts of 2048 tokens each fill a step: M/D/1.
    service, rate = 0.2, 4.0
    one = replicas(LinearCost(0.0, service / 2048), inputs=2048, outputs=1)
    state = one.at(np.array([rate]))
    load = rate * service
    wait = load * service / (2 * (1 - load))
    assert state.ttft[0].mean() == pytest.approx(service + wait, rel=0.05)


def test_requests_pile_up_beyond_what_seats_or_time_allow() -> None:
    few = replicas(LinearCost(0.01), seats=4)
    # 4 seats, 1.01 s each: at most 3.96 requests/s.
    assert not few.at(np.array([2.5])).saturated[0]
    assert few.at(np.array([4.2])).saturated[0]
    assert few.violation(np.array([4.2]), parse_slo("ttft<1s").limits)[0] == HOPELESS


@pytest.mark.parametrize("slo", ["tpot<30ms", "p50(ttft)<300ms,tpot<40ms", "mean(e2e)<3s"])
def test_capacity_is_where_the_slo_is_just_met(slo: str) -> None:
    limits = parse_slo(slo).limits
    one = replicas(LinearCost(0.01, 1e-4, 1e-7))
    capacity = one.capacity(limits)
    assert capacity[0] > 0
    assert one.violation(capacity * 0.98, limits)[0] <= 0
    assert one.violation(capacity * 1.03, limits)[0] > 0


def test_slower_steps_carry_less_and_impossible_limits_nothing() -> None:
    costs = [LinearCost(0.01 * f, 1e-4 * f) for f in (0.5, 1.0, 2.0, 4.0)]
    carried = replicas(*costs).capacity(parse_slo("tpot<30ms").limits)
    assert (np.diff(carried) < 0).all()
    assert carried[-1] == 0.0  # 40 ms a step even alone


def test_rows_do_not_depend_on_each_other() -> None:
    costs = [LinearCost(0.01, 1e-4), LinearCost(0.02, 3e-4), LinearCost(0.005, 2e-5, 1e-7)]
    limits = parse_slo("tpot<50ms,ttft<1s").limits
    together = replicas(*costs)
    alone = [replicas(cost).capacity(limits)[0] for cost in costs]
    assert together.capacity(limits) == pytest.approx(alone)
    assert together.between(1, 2).capacity(limits)[0] == pytest.approx(alone[1])


def test_the_limit_that_is_missed_first_is_named() -> None:
    one = replicas(LinearCost(0.01, 1e-4))
    limits = parse_slo("tpot<20ms,ttft<60s").limits
    capacity = one.capacity(limits)
    missed = one.missed_first(capacity * 1.02, limits)[0]
    assert missed is not None
    assert missed.text == "tpot<20ms"


def test_goodput_counts_requests_that_meet_every_limit() -> None:
    one = replicas(LinearCost(0.01, 1e-4))
    strict = one.capacity(parse_slo("tpot<20ms,goodput>=99%").limits)[0]
    loose = one.capacity(parse_slo("mean(tpot)<20ms,goodput>=50%").limits)[0]
    assert 0 < strict < loose
    assert log_shortfall(0.99, 0.99, 1000) == pytest.approx(0.0)
    assert log_shortfall(0.9, 0.99, 100_000) == pytest.approx(math.log(10), rel=0.01)
