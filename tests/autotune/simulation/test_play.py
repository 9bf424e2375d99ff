"""Fleets in virtual time: invariants, hand-made examples, and references of their own."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Sequence

import pytest

from autotune.predict.cost_model import CostDraw
from autotune.predict.drafting import DraftProfile, given_profile
from autotune.predict.load_times import LoadTimes
from autotune.predict.pace import Pace
from autotune.predict.replay import replay
from autotune.records import RequestRecord
from autotune.simulation.fleet import ONE, ROUTERS, Disaggregation, Fleet, Router
from autotune.simulation.play import Played, play
from autotune.simulation.replica import Replica
from autotune.workload.materialise import LoadRequest
from engine.engine import CacheShape
from tests.autotune.simulation.fake_model import FakeCost, config, load

COST = FakeCost(0.01, row=1e-4, seen=1e-6)
CACHE = CacheShape(200, 4096)
# Little of everything, so that requests wait, are cut into chunks and preempted.
TIGHT = {"max_num_seqs": 6, "max_num_batched_tokens": 48, "block_size": 16}
SPLIT = Disaggregation(
    2, 2, transfer_bytes_per_s=1e6, transfer_latency_s=0.005, kv_bytes_per_token=1e3
)
FLEETS = [*(Fleet(3, router) for router in ROUTERS), *(Fleet(1, r, SPLIT) for r in ROUTERS)]


def rounded(records: Sequence[RequestRecord]) -> list[RequestRecord]:
    """Records whose times are equal where sums in another order differ in their last digits."""
    return [
        dataclasses.replace(
            record,
            token_times=tuple(round(t, 9) for t in record.token_times),
            first_scheduled=record.first_scheduled and round(record.first_scheduled, 9),
        )
        for record in records
    ]


def play_fixed(
    requests: Sequence[LoadRequest], fleet: Fleet = ONE, step: float = 0.1, **knobs: object
) -> Played:
    """With steps that all take as long."""
    draw = CostDraw(FakeCost(step))
    return play(
        requests, config(**knobs), draw, CacheShape(500, 4096), drain_limit=1e6, fleet=fleet
    )


@pytest.mark.parametrize("prefixes", [0, 4])
def test_one_engine_is_the_replay(prefixes: int) -> None:
    requests = load(120, 20.0, seed=1, prefixes=prefixes)
    draw = CostDraw(COST, LoadTimes(0.001, 0.002, 0.0001), Pace(1.1, 0.5, (1.0, 1.5, 0.9)))
    knobs = config(**TIGHT)
    cache = CacheShape(20, 4096)
    played = play(requests, knobs, draw, cache, drain_limit=0.5)
    replayed = replay(
        requests, knobs, COST, cache, drain_limit=0.5, times=draw.times, pace=draw.pace
    )
    assert played.records == replayed.records
    assert played.totals == (replayed.totals,)
    assert played.duration == replayed.duration
    assert {r.outcome for r in played.records} == {"finished", "timed_out"}
    assert played.totals[0].preemptions > 0


@pytest.mark.parametrize("fleet", FLEETS, ids=str)
@pytest.mark.parametrize("drain_limit", [0.2, 1e3])
def test_every_request_leaves_once(fleet: Fleet, drain_limit: float) -> None:
    requests = load(150, 60.0, seed=2, prefixes=5)
    draw = CostDraw(COST)
    played = play(requests, config(**TIGHT), draw, CACHE, drain_limit=drain_limit, fleet=fleet)
    assert [r.request_id for r in played.records] == [r.request_id for r in requests]
    assert len(played.totals) == fleet.engines
    assert set(played.replicas) <= set(range(fleet.engines))
    for request, record in zip(requests, played.records, strict=True):
        assert record.intended_send == request.arrival_s
        assert record.asked_output_tokens == request.output_tokens
        assert record.input_tokens == len(request.token_ids)
        assert record.output_tokens == len(record.token_times)
        assert record.completed == (record.output_tokens == request.output_tokens)
        times = (request.arrival_s, *record.token_times)
        assert all(a < b for a, b in itertools.pairwise(times))
    outcomes = {r.outcome for r in played.records}
    assert outcomes == ({"finished"} if drain_limit > 1 else {"finished", "timed_out"})


@pytest.mark.parametrize("fleet", FLEETS, ids=str)
def test_the_same_again(fleet: Fleet) -> None:
    requests = load(100, 60.0, seed=3, prefixes=5)
    knobs = config(**TIGHT, speculative_method="ngram", num_speculative_tokens=2)

    def again(seed: int) -> Played:
        return play(
            requests,
            knobs,
            CostDraw(COST, drafts=DraftProfile((0.7, 0.5))),
            CACHE,
            drain_limit=1e3,
            fleet=fleet,
            seed=seed,
        )

    assert again(0) == again(0)
    assert again(0).records != again(1).records


def test_round_robin_deals_out_in_turn() -> None:
    requests = load(90, 40.0, seed=4)
    played = play(requests, config(**TIGHT), CostDraw(COST), CACHE, drain_limit=1e3, fleet=Fleet(3))
    assert list(played.replicas) == [place % 3 for place in range(90)]
    for place in range(3):
        alone = replay(requests[place::3], config(**TIGHT), COST, CACHE, drain_limit=1e3)
        assert played.records[place::3] == alone.records
        assert played.totals[place] == alone.totals


def shortest_queue(requests: Sequence[LoadRequest], replicas: int, step: float) -> list[float]:
    """When requests finish that are served one at a time, each by whom fewest were with.

    A service takes a step for each token, and begins at once. Written without the engine.
    """
    finishes: list[list[float]] = [[] for _ in range(replicas)]
    chosen = list(range(-replicas, 0))
    result = []
    for number, request in enumerate(requests):
        now = request.arrival_s
        busy = [sum(end > now for end in ends) for ends in finishes]
        place = min(range(replicas), key=lambda p: (busy[p], chosen[p]))
        chosen[place] = number
        begins = max([now, *finishes[place][-1:]])
        finishes[place].append(begins + step * request.output_tokens)
        result.append(finishes[place][-1])
    return result


@pytest.mark.parametrize("replicas", [2, 5])
def test_least_loaded_is_the_shortest_queue(replicas: int) -> None:
    requests = load(400, 0.9 * replicas / (20.5 * 0.1), seed=5)
    played = play_fixed(requests, Fleet(replicas, "least_loaded"), max_num_seqs=1)
    expected = shortest_queue(requests, replicas, 0.1)
    assert [r.token_times[-1] for r in played.records] == pytest.approx(expected)
    assert len(set(played.replicas)) == replicas


def central_queue(requests: Sequence[LoadRequest], replicas: int, step: float) -> float:
    """Mean waiting time of one queue before all of them (Kiefer and Wolfowitz 1955)."""
    free = [0.0] * replicas
    waits = []
    for request in requests:
        place = free.index(min(free))
        begins = max(request.arrival_s, free[place])
        waits.append(begins - request.arrival_s)
        free[place] = begins + step * request.output_tokens
    return statistics.fmean(waits)


def test_least_loaded_waits_longer_than_one_queue_and_less_than_in_turn() -> None:
    requests = load(2000, 0.8 * 4 / (20.5 * 0.1), seed=6)
    waits = {}
    for router in ("round_robin", "least_loaded"):
        played = play_fixed(requests, Fleet(4, router), max_num_seqs=1)
        assert all(r.first_scheduled is not None for r in played.records)
        waits[router] = statistics.fmean(
            (r.first_scheduled or 0.0) - r.intended_send for r in played.records
        )
    central = central_queue(requests, 4, 0.1)
    assert central < waits["least_loaded"] < 0.8 * waits["round_robin"]


@pytest.mark.parametrize("router", ["least_loaded", "prefix_aware"])
@pytest.mark.parametrize("lines", [True, False])
@pytest.mark.parametrize("rate", [5.0, 80.0])
def test_leaving_engines_alone_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, router: Router, lines: bool, rate: float
) -> None:
    requests = load(200, rate, seed=7)
    cost = dataclasses.replace(COST, lines=lines)
    draw = CostDraw(cost, LoadTimes(0.001, 0.0, 0.0001), Pace(1.1, 0.5, (1.0, 1.5, 0.9)))

    def again() -> Played:
        return play(requests, config(**TIGHT), draw, CACHE, drain_limit=1e3, fleet=Fleet(4, router))

    lazy = again()
    monkeypatch.setattr(Replica, "settle", Replica.run)
    eager = again()
    assert lazy.replicas == eager.replicas
    assert rounded(lazy.records) == rounded(eager.records)


def test_prefix_aware_finds_more_in_the_caches() -> None:
    requests = load(300, 20.0, seed=8, prefixes=24, prefix_tokens=128, output=(1, 10))
    hits = {}
    for router in ROUTERS:
        played = play(
            requests,
            config(max_num_seqs=16),
            CostDraw(FakeCost(0.01, row=1e-4)),
            CacheShape(120, 4096),  # not enough for all beginnings
            drain_limit=1e3,
            fleet=Fleet(3, router),
        )
        hits[router] = sum(r.cached_tokens for r in played.records)
        assert len(set(played.replicas)) == 3
    assert hits["prefix_aware"] > 1.3 * max(hits["round_robin"], hits["least_loaded"])


def test_prefix_aware_does_not_send_everyone_to_one_engine() -> None:
    requests = load(200, 100.0, seed=9, prefixes=1, prefix_tokens=64)
    played = play_fixed(requests, Fleet(4, "prefix_aware"), step=0.02, max_num_seqs=4)
    counts = [played.replicas.count(place) for place in range(4)]
    assert min(counts) > 25


def test_disaggregation_by_hand() -> None:
    """Steps of 0.1 s; 100 tokens a second over the link, and 0.05 s of latency."""
    split = Disaggregation(1, 1, 1e5, 0.05, kv_bytes_per_token=1e3)
    requests = [
        LoadRequest("a", 0.0, tuple(range(20)), 3),
        LoadRequest("b", 0.02, tuple(range(100, 110)), 2),
        LoadRequest("c", 0.03, tuple(range(200, 210)), 1),
    ]
    played = play_fixed(requests, Fleet(1, "round_robin", split), max_num_seqs=8)
    a, b, c = (record.token_times for record in played.records)
    # The first prompt ends at 0.1, the other two by one step at 0.2. The link carries that of a
    # until 0.3 and that of b from then until 0.4.
    assert a == pytest.approx((0.1, 0.45, 0.55))
    assert b == pytest.approx((0.2, 0.55))
    assert c == pytest.approx((0.2,))
    assert played.replicas == (1, 1, 0)
    assert [t.prefill_tokens for t in played.totals] == [40, 2]


def test_a_transfer_that_ends_too_late_is_a_miss() -> None:
    split = Disaggregation(1, 1, 1e5, 5.0, kv_bytes_per_token=1e3)
    requests = [LoadRequest("a", 0.0, tuple(range(20)), 3)]
    played = play(
        requests,
        config(),
        CostDraw(FakeCost(0.1)),
        CACHE,
        drain_limit=1.0,
        fleet=Fleet(1, "round_robin", split),
    )
    (record,) = played.records
    assert record.outcome == "timed_out"
    assert record.token_times == pytest.approx((0.1,))
    assert record.asked_output_tokens == 3


def test_prompts_do_not_hold_up_decodes_elsewhere() -> None:
    requests = load(100, 8.0, seed=10, prompt=(200, 400), output=(20, 40))
    draw = CostDraw(FakeCost(0.005, row=2e-4))
    gaps = {}
    for fleet in (Fleet(2), Fleet(1, "round_robin", Disaggregation(1, 1, 1e12, 0.0, 1.0))):
        played = play(
            requests, config(), draw, CacheShape(4000, 4096), drain_limit=1e3, fleet=fleet
        )
        gaps[fleet.engines, fleet.disaggregation is None] = max(
            later - earlier
            for record in played.records
            for earlier, later in itertools.pairwise(record.token_times[1:])
        )
    assert gaps[2, False] < gaps[2, True] / 2


def test_what_was_generated_first_reaches_the_caches_of_who_decodes() -> None:
    """A second turn finds the first answer in the cache that its prompt was computed in."""
    outputs = {"a": tuple(range(1000, 1040)), "b": (1, 2)}
    first = LoadRequest("a", 0.0, tuple(range(32)), 40)
    second = LoadRequest("b", 100.0, (*first.token_ids, *outputs["a"], 7), 2)
    played = {}
    for fleet in (ONE, Fleet(1, "round_robin", Disaggregation(1, 1, 1e9, 0.0, 1.0))):
        played[fleet.engines] = play(
            [first, second],
            config(block_size=16),
            CostDraw(FakeCost(0.01)),
            CACHE,
            drain_limit=1e3,
            fleet=fleet,
            outputs=outputs,
        )
    assert played[1].records[1].cached_tokens == 64  # of 32 + 39: the last has no keys yet
    assert played[2].records[1].cached_tokens == 32  # the answer was computed elsewhere
    assert played[2].totals[1].prefix_hit_tokens > 0  # and is known there
    rates = [played[n].metrics(None, config())["engine"]["prefix_hit_rate"] for n in (1, 2)]
    assert rates == pytest.approx([64 / 105, 32 / 105])  # of 32 and 73 tokens of prompts


def test_accepted_drafts_come_at_once() -> None:
    request = LoadRequest("a", 0.0, (1, 2, 3), 10)
    played = play(
        [request],
        config(speculative_method="ngram", num_speculative_tokens=5, speculative_adaptive=False),
        CostDraw(FakeCost(0.1)),
        CACHE,
        drain_limit=1e3,
        drafts=given_profile((1.0, 1.0), 0.05),
    )
    times = played.records[0].token_times
    assert times == pytest.approx([0.1, *[0.25] * 3, *[0.4] * 3, *[0.55] * 3])
    told = played.metrics(None, config(speculative_method="ngram"))["speculation"]
    assert told["tokens_per_step"] == 3.0
    assert told["hit_share"] == 1.0
    assert told["draft_time_share"] == pytest.approx(0.15 / 0.55)
    assert told["acceptance"] == {"1": 1.0, "2": 1.0, "3": None, "4": None}


def test_metrics_are_those_of_bench_for_the_whole_fleet() -> None:
    requests = load(60, 30.0, seed=11)
    played = play(requests, config(**TIGHT), CostDraw(COST), CACHE, drain_limit=1e3, fleet=Fleet(3))
    metrics = played.metrics(None, config(**TIGHT))
    assert metrics["completed"] == 60
    assert metrics["duration_s"] == played.duration
    steps = [t.steps for t in played.totals]
    assert metrics["engine"]["steps"] == sum(steps)
    assert metrics["engine"]["kv_blocks_total"] == 3 * 200
    fullest = max(t.peak_blocks for t in played.totals) / 200
    assert metrics["engine"]["kv_peak_usage"] == pytest.approx(fullest, abs=1 / 600)
    assert metrics["ttft"]["p95"] > 0


def test_a_prompt_whose_last_token_comes_alone_gets_all_of_its_tokens() -> None:
    """Its last chunk looks as a decode does."""
    request = LoadRequest("a", 0.0, tuple(range(9)), 5)
    played = play_fixed([request], max_num_batched_tokens=8, max_num_seqs=4)
    assert played.records[0].token_times == pytest.approx((0.2, 0.3, 0.4, 0.5, 0.6))


def test_ids_must_differ() -> None:
    request = LoadRequest("a", 0.0, (1, 2, 3), 10)
    with pytest.raises(ValueError, match="ids of a load must differ"):
        play_fixed([request, request])
