"""Host, collectives, unevenness and pictures of a load's steps; and their cost without probes."""

from __future__ import annotations

import numpy as np
import pytest

from autotune.predict.step_cost import StepWork
from autotune.profiling.communication import communication
from autotune.profiling.counted_cost import CountedCost
from autotune.profiling.host import host
from autotune.profiling.imbalance import imbalance
from autotune.profiling.series import series
from autotune.profiling.step_columns import StepColumns
from tests.autotune.profiling.loads import LinearCost, poisson, served, step


def test_a_step_ends_where_the_next_begins() -> None:
    columns = StepColumns.of([step(0.0, 2.0), step(1.5, 1.0), step(4.0, 1.0, 0.5)])
    assert columns.end.tolist() == [1.5, 2.5, 5.5]
    assert columns.seconds.tolist() == [2.0, 1.0, 1.5]


def test_the_hosts_share_is_of_all_steps_and_of_decodes() -> None:
    steps = [
        step(0.0, 3.0, 1.0, prefill_tokens=10, prefill_sequences=1, scheduler_seconds=0.5),
        step(4.0, 1.0, 1.0, decode_sequences=1, scheduler_seconds=0.1),
        step(6.0, 1.0, 3.0, decode_sequences=1),
    ]
    found = host(StepColumns.of(steps))
    assert found is not None
    assert found.share == pytest.approx(0.5)
    assert found.decode_share == pytest.approx(4 / 6)
    assert found.per_step_s == 1.0
    assert found.scheduler_share == pytest.approx(0.06)
    assert host(StepColumns.of([])) is None
    only_prompt = host(StepColumns.of(steps[:1]))
    assert only_prompt is not None
    assert only_prompt.decode_share is None


def test_drafting_is_no_time_that_the_device_waits_for_the_host() -> None:
    steps = [step(0.0, 1.0, 1.0, decode_sequences=1, draft_seconds=0.75) for _ in range(4)]
    found = host(StepColumns.of(steps))
    assert found is not None
    assert (found.share, found.decode_share, found.per_step_s) == (0.125, 0.125, 0.25)


def test_collectives_are_a_share_of_device_time_and_partly_waiting() -> None:
    steps = [
        step(i, 1.0, 0.5, decode_sequences=1, communication_seconds=0.4, waiting_seconds=0.1)
        for i in range(4)
    ]
    found, partial = communication(StepColumns.of(steps), 2)
    assert not partial
    assert found is not None
    assert (found.ranks, found.share, found.per_step_s) == (2, pytest.approx(0.4), 0.4)
    assert found.imbalance == pytest.approx(0.25)
    assert communication(StepColumns.of(steps), 1) == (None, [])


def test_collectives_that_nobody_times_are_unknown() -> None:
    steps = [step(decode_sequences=1, communication_seconds=None, waiting_seconds=None)]
    found, partial = communication(StepColumns.of(steps), 4)
    assert found is not None
    assert found.ranks == 4
    assert found.share is found.imbalance is None
    assert len(partial) == 1


def test_unevenness_is_the_coefficient_of_variation() -> None:
    steps = [step(4 * i, 1.0 + 2 * (i % 2), decode_sequences=8) for i in range(20)]
    found = imbalance(StepColumns.of(steps))
    assert found is not None
    assert found.step_time_cv == pytest.approx(0.5)
    assert found.step_tokens_cv == 0.0
    assert imbalance(StepColumns.of(steps[:19])) is None


def test_pictures_have_some_hundred_points_that_keep_the_means() -> None:
    evidence, _ = served(poisson(100, 300, seed=1), LinearCost())
    columns = StepColumns.of(evidence.steps)
    assert len(columns) > 1000
    points = series(columns, points=100)
    assert len(points) <= 100
    assert [p.at_s for p in points] == sorted(p.at_s for p in points)
    assert max(p.running for p in points) <= columns.running.max()
    assert all(0 <= p.occupancy <= 1 for p in points if p.occupancy is not None)
    few = [step(float(i), 1.0, running=i, queue_length=2 * i, blocks_used=10) for i in range(5)]
    assert [(p.at_s, p.running, p.queue, p.occupancy) for p in series(StepColumns.of(few))] == [
        (i, i, 2 * i, 0.1) for i in range(5)
    ]
    assert series(StepColumns.of([])) == []


def test_the_cost_of_steps_is_found_in_their_records() -> None:
    cost = LinearCost()
    evidence, _ = served(poisson(120, 200, seed=9), cost)
    found = CountedCost.fit(StepColumns.of(evidence.steps))
    assert found.base == pytest.approx(cost.step + cost.overhead, rel=0.01)
    assert found.row == pytest.approx(cost.row, rel=0.01)
    assert found.kv_token == pytest.approx(cost.kv_token, rel=0.01)
    assert found.pair == pytest.approx(cost.pair, rel=0.05)
    works = [StepWork.of(s) for s in evidence.steps]
    predicted = [found.device_seconds(w) + found.host_seconds(w) for w in works]
    assert predicted == pytest.approx([s.seconds for s in evidence.steps], rel=0.01)
    assert all(np.isfinite(list(found.terms(w).values())).all() for w in works)
