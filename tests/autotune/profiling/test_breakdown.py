"""Where time goes, against what was put in and against slow loops over every step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.predict.step_cost import StepWork
from autotune.profiling.breakdown import Timeline, breakdowns, throughput, tpot, ttft
from autotune.profiling.step_columns import StepColumns
from autotune.records import RequestRecord
from engine.step_record import StepRecord
from tests.autotune.profiling.loads import LinearCost, poisson, request, served, step

COST = LinearCost(step=0.4, row=0.01, kv_token=0.001, pair=0.0001, overhead=0.05)


def timeline(steps: Sequence[StepRecord], cost: LinearCost = COST) -> Timeline:
    return Timeline(steps, StepColumns.of(steps), cost)


def prompts(tokens: int, sequences: int = 1, **more: int) -> dict[str, int]:
    """What a step of whole prompts of so many tokens together says, if there is one."""
    pairs = tokens * (tokens + 1) // 2
    return {"prefill_tokens": tokens, "prefill_sequences": sequences, "prefill_pairs": pairs} | more


def test_ttft_is_the_wait_for_a_seat_and_the_prompts_own_step() -> None:
    # One prompt of 10 tokens: 0.4 weights, 0.1 rows, 55 pairs, 0.05 overhead; the device took 0.6.
    steps = [step(2.0, 0.6, 0.2, **prompts(10))]
    one = request(intended_send=1.0, first_scheduled=2.0, token_times=(2.8,))
    found = ttft([one], timeline(steps))
    assert found.seconds == pytest.approx(1.8)
    assert {k: v * 1.8 for k, v in found.parts.items() if v > 1e-12} == pytest.approx(
        {
            "queue": 1.0,
            "host": 0.2,
            "weights": 0.4,
            "prefill_linear": 0.1,
            "prefill_attention": 0.0055,
            "other": 0.05 + 0.6 - 0.5555,
        }
    )


def test_the_end_of_a_step_under_way_is_no_wait_for_a_seat() -> None:
    # A decode step runs from 0 to 1; the request comes at 0.5 and gets the next step.
    steps = [
        step(0.0, 0.8, 0.2, decode_sequences=1, kv_tokens_read=100),
        step(1.0, 0.6, 0.2, **prompts(10)),
    ]
    one = request(intended_send=0.5, first_scheduled=1.0, token_times=(1.8,))
    parts = ttft([one], timeline(steps)).parts
    assert parts["queue"] == 0.0
    # Half of the step before: of its cached tokens and its host too.
    assert parts["kv_reads"] * 1.3 == pytest.approx(0.5 * 0.1)
    assert parts["host"] * 1.3 == pytest.approx(0.5 * 0.2 + 0.2)


def test_others_chunks_before_and_beside_ones_own_are_interference() -> None:
    # Seated at 0, but the first step is another's prompt; the second is shared evenly.
    pairs = 10 * 11 // 2
    steps = [
        step(0.0, 0.55, **prompts(10)),
        step(1.0, 0.661, prefill_tokens=20, prefill_sequences=2, prefill_pairs=2 * pairs),
    ]
    one = request(first_scheduled=0.0, token_times=(1.661,))
    found = ttft([one], timeline(steps))
    seconds = {name: share * 1.661 for name, share in found.parts.items()}
    # Of the 30 rows 10 are its own, of the 165 pairs 55.
    assert seconds["prefill_linear"] == pytest.approx(0.3 / 3)
    assert seconds["prefill_attention"] == pytest.approx(0.0165 / 3)
    assert seconds["interference"] == pytest.approx(0.2 + 0.011)
    assert seconds["idle"] == pytest.approx(0.45)


def test_tpot_splits_the_steps_between_tokens() -> None:
    # One decode step beside a prompt, one alone: 3 tokens, 2 gaps.
    steps = [
        step(
            1.0,
            0.8,
            0.1,
            decode_sequences=1,
            kv_tokens_read=60,
            prefill_kv_tokens_read=10,
            **prompts(10),
        ),
        step(1.9, 0.6, 0.1, decode_sequences=1, kv_tokens_read=51),
    ]
    one = request(token_times=(1.0, 1.9, 2.6))
    found = tpot([one], timeline(steps))
    assert found.seconds == pytest.approx(0.8)
    seconds = {name: share * 1.6 for name, share in found.parts.items()}
    assert seconds["interference"] == pytest.approx(0.1 + 0.0055)
    assert seconds["linear_compute"] == pytest.approx(0.02)
    assert seconds["kv_reads"] == pytest.approx(0.05 + 0.051)
    assert seconds["weights"] == pytest.approx(0.8)
    assert seconds["host"] == pytest.approx(0.2)


def test_a_preempted_requests_long_gap_is_all_preempted() -> None:
    steps = [step(float(i), 1.0, decode_sequences=1, kv_tokens_read=10) for i in range(10)]
    one = request(token_times=(1.0, 2.0, 7.0, 8.0), preemptions=1)
    parts = tpot([one], timeline(steps)).parts
    assert parts["preempted"] == pytest.approx(5 / 7)
    assert parts["weights"] * 7 == pytest.approx(2 * 0.4)


def test_of_gaps_of_one_step_none_is_preempted() -> None:
    steps = [step(float(i), 1.0, decode_sequences=1) for i in range(10)]
    one = request(token_times=(1.0, 2.0, 3.0), preemptions=1)
    assert tpot([one], timeline(steps)).parts["preempted"] == 0.0


def test_drafting_and_verification_are_parts_of_their_own() -> None:
    # Two decodes, one of which verifies three tokens: 3 rows more; drafting is host time.
    plain = {"decode_sequences": 2, "sampled_sequences": 2, "kv_tokens_read": 60}
    drafts = {"drafted_tokens": 3, "accepted_tokens": 2, "draft_seconds": 0.06}
    depths = {"drafted_by_depth": (1, 1, 1), "accepted_by_depth": (1, 1, 0)}
    steps = [step(0.0, 0.6, 0.1, **plain, **drafts, **depths), step(0.7, 0.57, 0.04, **plain)]
    # Three tokens come with the first step.
    one = request(token_times=(0.0, 0.7, 0.7, 0.7, 1.31))
    found = tpot([one], timeline(steps))
    assert found.seconds == pytest.approx(1.31 / 4)
    seconds = {name: share * 1.31 for name, share in found.parts.items()}
    assert seconds["drafting"] == pytest.approx(0.06)
    assert seconds["host"] == pytest.approx(0.04 + 0.04)
    assert seconds["verification"] == pytest.approx(3 * 0.01)
    assert seconds["linear_compute"] == pytest.approx(2 * 2 * 0.01)
    assert seconds["weights"] == pytest.approx(2 * 0.4)
    assert seconds["kv_reads"] == pytest.approx(2 * 0.06)
    assert sum(found.parts.values()) == pytest.approx(1.0)


def test_throughput_is_of_wall_time_with_what_was_idle() -> None:
    steps = [step(1.0, 0.55, 0.1, **prompts(10)), step(3.0, 0.5, decode_sequences=1)]
    one = request(intended_send=0.0, first_scheduled=1.0, token_times=(1.65, 3.5))
    found = throughput([one], timeline(steps), recomputed_share=0.25)
    seconds = {name: share * found.seconds for name, share in found.parts.items()}
    assert found.seconds == pytest.approx(3.5)
    assert seconds["idle"] == pytest.approx(3.5 - 0.65 - 0.5)
    assert seconds["preempted"] == pytest.approx(0.25 * 0.1055)
    assert seconds["prefill_linear"] == pytest.approx(0.75 * 0.1)


def test_measured_collectives_come_before_what_the_cost_says() -> None:
    steps = [step(0.0, 0.8, decode_sequences=1, communication_seconds=0.3)]
    one = request(token_times=(0.0, 0.8))
    parts = tpot([one], timeline(steps)).parts
    assert parts["communication"] == pytest.approx(0.3 / 0.8)


def test_a_cost_that_explains_too_much_is_scaled_to_the_time_there_was() -> None:
    steps = [step(0.0, 0.2, 0.1, decode_sequences=1)]  # the cost says 0.46
    found = tpot([request(token_times=(0.0, 0.3))], timeline(steps))
    assert sum(found.parts.values()) == pytest.approx(1.0)
    assert found.parts["host"] == pytest.approx(1 / 3)
    assert found.parts["other"] == 0.0
    assert found.parts["weights"] / found.parts["linear_compute"] == pytest.approx(40)


def test_known_costs_are_found_again_in_a_real_schedule() -> None:
    cost = LinearCost()
    evidence, _ = served(poisson(150, 200, seed=5, shared=64), cost)
    found, partial = breakdowns(evidence.requests, timeline(evidence.steps, cost), 0.0)
    assert not partial
    for breakdown in found:
        assert sum(breakdown.parts.values()) == pytest.approx(1.0)
        assert all(share >= 0 for share in breakdown.parts.values())
    by_metric = {b.metric: b for b in found}
    assert by_metric["ttft"].seconds == pytest.approx(np.mean([r.ttft for r in evidence.requests]))
    assert by_metric["tpot"].seconds == pytest.approx(
        np.mean([r.tpot for r in evidence.requests if r.tpot is not None])
    )
    # Of wall time each part is exactly what the steps were charged for it.
    wall = by_metric["throughput"]
    terms = [cost.terms(StepWork.of(s)) for s in evidence.steps]
    for part, term in (
        ("weights", "weights"),
        ("kv_reads", "kv_reads"),
        ("prefill_attention", "prefill_attention"),
        ("other", "overhead"),
    ):
        expected = sum(t[term] for t in terms)
        assert wall.parts[part] * wall.seconds == pytest.approx(expected, rel=1e-6), part
    assert wall.parts["host"] * wall.seconds == pytest.approx(cost.host * len(evidence.steps))


def test_a_preempted_load_spends_time_on_what_it_lost() -> None:
    requests = poisson(400, 60, seed=2, inputs=(30, 60), outputs=(40, 80))
    evidence, _ = served(requests, LinearCost(), num_blocks=40)
    assert sum(r.preemptions for r in evidence.requests) > 10
    found = tpot([r for r in evidence.requests if r.tpot], timeline(evidence.steps, LinearCost()))
    # Whoever is preempted waits for many steps; count them straight from the records.
    ends = [s.start + s.seconds for s in evidence.steps]
    lost = whole = 0.0
    for record in evidence.requests:
        times = record.token_times
        if len(times) < 2:
            continue
        gaps = len(times) - 1
        whole += (times[-1] - times[0]) / gaps
        for a, b in pairwise(times):
            if record.preemptions and sum(a < e - 1e-12 <= b for e in ends) > 1:
                lost += (b - a) / gaps
    assert lost / whole > 0.05
    assert found.parts["preempted"] == pytest.approx(lost / whole, rel=1e-6)


def test_too_few_requests_have_no_breakdown_of_latencies() -> None:
    steps = [step(float(i), 1.0, decode_sequences=1) for i in range(40)]
    few = [request(str(i), first_scheduled=0.0, token_times=(1.0, 5.0)) for i in range(19)]
    found, partial = breakdowns(few, timeline(steps), None)
    assert [b.metric for b in found] == ["throughput"]
    assert partial == [
        "the breakdown of time to first token needs at least 20 requests; has 19",
        "the breakdown of time per output token needs at least 20 requests; has 19",
    ]


@st.composite
def schedules(draw: st.DrawFn) -> tuple[list[StepRecord], list[RequestRecord]]:
    """Steps with gaps and overlaps, and requests that begin and end anywhere."""
    steps, at = [], 0.0
    seconds = st.floats(0.0, 2.0)
    for _ in range(draw(st.integers(1, 12))):
        device, host = draw(seconds), draw(seconds)
        tokens = draw(st.integers(0, 20))
        decodes = draw(st.integers(0 if tokens else 1, 5))
        counts = prompts(tokens) if tokens else {}
        kv = draw(st.integers(0, 50))
        steps.append(step(at, device, host, decode_sequences=decodes, kv_tokens_read=kv, **counts))
        at += draw(st.floats(0.2, 1.5)) * (device + host)
    moments = st.floats(0.0, at + 1.0)
    requests = []
    for i in range(draw(st.integers(1, 5))):
        sent, seated, first, last = sorted(draw(st.tuples(moments, moments, moments, moments)))
        requests.append(
            request(
                str(i),
                intended_send=sent,
                send=sent,
                first_scheduled=seated,
                token_times=(first, last),
                preemptions=draw(st.integers(0, 1)),
            )
        )
    return steps, requests


@given(schedules())
@settings(max_examples=150, deadline=None)
def test_parts_of_any_schedule_make_up_the_whole_time(
    schedule: tuple[list[StepRecord], list[RequestRecord]],
) -> None:
    steps, requests = schedule
    line = timeline(steps)
    for found, times in (
        (ttft(requests, line), [r.token_times[0] - r.intended_send for r in requests]),
        (tpot(requests, line), [r.token_times[-1] - r.token_times[0] for r in requests]),
    ):
        total = sum(found.parts.values())
        assert all(share >= 0 for share in found.parts.values())
        if sum(times) > 1e-6:
            assert total == pytest.approx(1.0)
            assert found.seconds == pytest.approx(np.mean(times), rel=1e-6, abs=1e-9)
        else:
            assert found.seconds == pytest.approx(0.0, abs=1e-6)


@given(schedules())
@settings(max_examples=100, deadline=None)
def test_time_between_two_moments_is_that_of_a_walk_over_all_steps(
    schedule: tuple[list[StepRecord], list[RequestRecord]],
) -> None:
    steps, requests = schedule
    line = timeline(steps)
    begin = np.array([r.intended_send for r in requests])
    end = np.array([r.token_times[-1] for r in requests])
    hosts = line.split(begin, end)["host"]
    for index in range(len(requests)):
        expected = 0.0
        for i, each in enumerate(steps):
            stop = each.start + each.seconds
            if i + 1 < len(steps):
                stop = max(each.start, min(stop, steps[i + 1].start))
            length = stop - each.start
            inside = max(0.0, min(end[index], stop) - max(begin[index], each.start))
            if length > 0:
                expected += inside / length * each.host_seconds * (length / each.seconds)
        assert hosts[index] == pytest.approx(expected, rel=1e-6, abs=1e-9)
