"""Waiting, and whether the server keeps up."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from autotune.predict.step_cost import StepWork
from autotune.profiling.evidence import LoadEvidence
from autotune.profiling.queueing import growth_of, queueing, service_seconds
from autotune.profiling.schema import Queueing
from autotune.profiling.step_columns import StepColumns
from autotune.records import RequestRecord
from engine.config import EngineConfig
from tests.autotune.profiling.loads import LinearCost, poisson, request, served, step

COST = LinearCost()
CONFIG = EngineConfig(model="test", max_num_seqs=8, max_num_batched_tokens=64)


def queue_of(evidence: LoadEvidence, config: EngineConfig) -> Queueing:
    found, _ = queueing(evidence, StepColumns.of(evidence.steps), config, COST)
    return found


def single_server(rate: float, count: int, seed: int) -> list[RequestRecord]:
    """A queue before one server that takes a second for each (M/D/1)."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / rate, count))
    free, records = 0.0, []
    for index, at in enumerate(arrivals):
        free = max(free, float(at)) + 1.0
        records.append(
            request(str(index), intended_send=float(at), send=float(at), token_times=(free,))
        )
    return records


@pytest.mark.parametrize("seed", range(5))
def test_a_queue_that_grows_is_told_from_one_that_does_not(seed: int) -> None:
    for rate, grows in ((0.5, False), (1.5, True), (3.0, True)):
        records = single_server(rate, 600, seed)
        first, last = records[0].intended_send, records[-1].intended_send
        growth = growth_of(records, first, last)
        assert growth is not None
        assert (growth.low > 0.05 * rate) is grows
        if grows:
            # What arrives and is not served piles up.
            begin = first + 0.2 * (last - first)
            arrived = sum(r.intended_send > begin for r in records) / (last - begin)
            assert growth.per_s == pytest.approx(arrived - 1.0, rel=0.2)
            assert growth.low < growth.per_s < growth.high


def test_service_seconds_are_the_reciprocal_of_what_a_full_engine_serves() -> None:
    """Against the engine itself, which gets all requests at once."""
    for knobs, blocks in (({"max_num_seqs": 16}, 4096), ({"max_num_seqs": 256}, 120)):
        requests = poisson(1e6, 800, seed=11, inputs=(50, 150), outputs=(10, 60))
        evidence, config = served(
            requests, COST, num_blocks=blocks, max_num_batched_tokens=512, **knobs
        )
        columns = StepColumns.of(evidence.steps)
        took = service_seconds(evidence.requests, columns, config, COST)
        end = max(r.token_times[-1] for r in evidence.requests)
        assert took == pytest.approx(end / 800, rel=0.15), knobs


def test_accepted_drafts_serve_a_request_in_fewer_and_longer_steps() -> None:
    requests = [request(str(i), token_times=tuple(range(21)), input_tokens=10) for i in range(4)]
    config = EngineConfig(model="test", max_num_seqs=4, max_num_batched_tokens=40)
    decodes = {"decode_sequences": 4, "sampled_sequences": 4, "kv_tokens_read": 80}
    drafts = {"drafted_tokens": 8, "accepted_tokens": 6, "draft_seconds": 0.01}
    # Steps of fewer sequences, which draft more, do not count.
    few = [step(float(i), decode_sequences=1, drafted_tokens=5) for i in range(50)]
    full = [step(float(i), **decodes, **drafts) for i in range(30)]
    found = service_seconds(requests, StepColumns.of(few + full), config, COST)
    plain = [step(float(i), **decodes) for i in range(30)]
    without = service_seconds(requests, StepColumns.of(plain), config, COST)
    assert found is not None
    assert without is not None
    context = (10 * 21 + 21**2 / 2) / 21
    decode = StepWork(4, 0, 4, 4, 4 * context, 0, 0)
    seconds = COST.device_seconds(decode) + COST.host
    longer = seconds + COST.row * 8 + 0.01
    assert without - found == pytest.approx(20 * seconds / 4 - 20 / 2.5 * longer / 4)


def test_utilisation_rises_with_the_rate_and_passes_one_where_the_queue_grows() -> None:
    seen = []
    for rate in (20.0, 60.0, 400.0):
        evidence, config = served(
            poisson(rate, 600, seed=13, inputs=(50, 150), outputs=(10, 60)), COST, max_num_seqs=16
        )
        queue = queue_of(evidence, config)
        assert queue.utilisation is not None
        assert queue.stable is (rate < 400)
        assert (queue.utilisation >= 1) is (rate == 400)
        seen.append(queue.utilisation)
    assert seen == sorted(seen)
    # At a rate far above, utilisation is the ratio to what was served in the end.
    served_rate = 600 / max(r.token_times[-1] for r in evidence.requests)
    assert seen[-1] == pytest.approx(400 / served_rate, rel=0.1)


def test_long_answers_that_pile_up_without_a_queue_are_no_saturation() -> None:
    # Each answer takes longer than arrivals last; every seat is free.
    requests = poisson(5, 30, seed=3, inputs=(10, 20), outputs=(1200, 1201))
    evidence, config = served(requests, COST)
    queue = queue_of(evidence, config)
    assert queue.growth_per_s is not None
    assert queue.growth_per_s > 1
    assert queue.queue_max == 0
    assert queue.stable
    assert queue.utilisation is not None
    assert queue.utilisation < 1


def test_a_machine_that_was_slower_than_its_cost_says_is_as_busy_as_it_was() -> None:
    evidence, config = served(poisson(60, 400, seed=13, outputs=(10, 60)), COST, max_num_seqs=16)
    half = LinearCost(**{name: value / 2 for name, value in dataclasses.asdict(COST).items()})
    columns = StepColumns.of(evidence.steps)
    honest, _ = queueing(evidence, columns, config, COST)
    deceived, _ = queueing(evidence, columns, config, half)
    assert honest.utilisation is not None
    assert deceived.utilisation == pytest.approx(honest.utilisation)


def test_waits_are_from_the_intended_send_to_the_first_seat() -> None:
    records = [
        request(
            str(i),
            intended_send=float(i),
            send=i + 0.5,
            first_scheduled=i + 0.75,
            token_times=(i + 1.0,),
        )
        for i in range(20)
    ]
    steps = [step(i + 0.75, 0.25, decode_sequences=1, running=1) for i in range(20)]
    queue = queue_of(LoadEvidence(records, steps), CONFIG)
    assert queue.wait is not None
    assert queue.wait.mean == pytest.approx(0.75)
    assert queue.wait_share == pytest.approx(0.75)
    # A quarter of each of 19 seconds, less the last, which begins after the last arrival.
    assert queue.busy_share == pytest.approx(0.25)
    assert queue.running_mean == pytest.approx(20 * 0.25 / 19.25)


def test_what_requests_wait_for_is_told_apart() -> None:
    waiting = {"queue_length": 2, "decode_sequences": 4}
    steps = [
        step(0.0, 1.0, running=8, **waiting),
        step(1.0, 1.0, running=4, **(waiting | {"prefill_tokens": 60})),
        step(2.0, 2.0, running=4, **waiting),
        step(4.0, 1.0, running=8, decode_sequences=8),
    ]
    records = [request()]
    queue = queue_of(LoadEvidence(records, steps), CONFIG)
    assert queue.at_seat_limit_share == pytest.approx(0.2)
    assert queue.at_token_budget_share == pytest.approx(0.2)
    assert queue.barrier_share == 0.0
    assert queue.queue_max == 2
    assert queue.queue_mean == pytest.approx(1.6)
    static = queue_of(LoadEvidence(records, steps), CONFIG.replace(batching_mode="static"))
    assert static.barrier_share == pytest.approx(0.6)


def test_requests_that_come_all_at_once_have_no_utilisation() -> None:
    records = [request(str(i), first_scheduled=0.0) for i in range(30)]
    steps = [step(0.0, 1.0, decode_sequences=1)]
    found, partial = queueing(LoadEvidence(records, steps), StepColumns.of(steps), CONFIG, COST)
    assert found.utilisation is found.stable is found.busy_share is None
    assert any("offered at once" in sentence for sentence in partial)


def test_records_that_do_not_tell_when_requests_ran_say_so() -> None:
    records = [request(str(i), intended_send=float(i)) for i in range(30)]
    steps = [step(0.0, 1.0, decode_sequences=1)]
    found, partial = queueing(LoadEvidence(records, steps), StepColumns.of(steps), CONFIG, COST)
    assert found.wait is None
    assert any("earlier release" in sentence for sentence in partial)


def test_a_few_requests_are_no_trend() -> None:
    records = [request(str(i), intended_send=float(i), first_scheduled=i + 0.1) for i in range(19)]
    steps = [step(0.0, 1.0, decode_sequences=1)]
    found, partial = queueing(LoadEvidence(records, steps), StepColumns.of(steps), CONFIG, COST)
    assert found.stable is found.utilisation is found.wait is None
    assert "a verdict on the queue needs at least 20 requests; has 19" in partial
    assert "the wait for a seat needs at least 20 requests; has 19" in partial
