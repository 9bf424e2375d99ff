"""Runs of steps taken at once leave what as many single steps leave, to the last bit.

All times are dyadic fractions, so that sums come out the same in any order and equality is exact.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.predict.load_times import NO_TIMES, LoadTimes
from autotune.predict.pace import STEADY, Pace
from autotune.predict.step_cost import StepWork
from autotune.predict.step_times import DecodeLine
from autotune.predict.virtual_engine import VirtualEngine
from autotune.records import RequestRecord
from autotune.workload.materialise import LoadRequest
from engine.config import EngineConfig
from engine.engine import CacheShape

UNIT = 2.0**-12  # seconds
MAX_MODEL_LEN = 128
# Few words, so that contents come up again and again.
WORDS = 3
STEMS = ((1, 2) * 12, (1, 2) * 6 + (0,) * 12, (2,) * 20)


@dataclass(frozen=True)
class SteppedCost:
    """Steps whose time depends on all that the scheduler decides; played one by one.

    `pieces` are slopes, in units of 2^-20 s per cached token, from 0 tokens on and from each
    further 64.
    """

    base: int
    row: int
    sequence: int
    pieces: tuple[int, ...]
    host: int

    def decode_line(self, sequences: int) -> DecodeLine | None:
        return None

    def device_seconds(self, work: StepWork) -> float:
        fixed = self.base + self.row * work.rows + self.sequence * work.sequences
        cached = self._cached(work.decode_kv_tokens) + self._cached(work.prefill_kv_tokens)
        return UNIT * fixed + cached + 2.0**-22 * work.prefill_pairs

    def host_seconds(self, work: StepWork) -> float:
        return UNIT * self.host

    def _cached(self, tokens: float) -> float:
        seconds = 0.0
        for place, slope in enumerate(self.pieces):
            last = place == len(self.pieces) - 1
            within = max(0.0, tokens - 64 * place)
            seconds += slope * 2.0**-20 * (within if last else min(64.0, within))
        return seconds


@dataclass(frozen=True)
class LinedCost(SteppedCost):
    """The same cost, and what decodes cost by the cached tokens that they see."""

    def decode_line(self, sequences: int) -> DecodeLine | None:
        tokens = [64.0 * place for place in range(len(self.pieces) + 1)]
        works = [StepWork(sequences, 0, sequences, sequences, seen, 0, 0) for seen in tokens]
        seconds = [self.device_seconds(work) + self.host_seconds(work) for work in works]
        return DecodeLine(tuple(tokens), tuple(seconds))


@dataclass(frozen=True)
class Play:
    """A situation: engine, costs, traffic, and the moments at which somebody looks."""

    knobs: Mapping[str, Any]
    blocks: int
    cost: Mapping[str, Any]
    requests: Sequence[LoadRequest]
    outputs: Mapping[str, Sequence[int]] | None
    received: Mapping[str, int]
    times: LoadTimes
    pace: Pace
    looks: Sequence[float]
    give_up: float | None


@st.composite
def plays(draw: st.DrawFn) -> Play:
    seats = draw(st.integers(1, 7))
    knobs: dict[str, Any] = {
        "block_size": draw(st.sampled_from([8, 8, 16])),
        "max_num_seqs": seats,
        "max_num_batched_tokens": draw(st.sampled_from([8, 9, 24, 128])),
        "enable_chunked_prefill": draw(st.sampled_from([True, True, False])),
        "enable_prefix_caching": draw(st.booleans()),
        "long_prefill_token_threshold": draw(st.sampled_from([0, 0, 5])),
        "scheduling_policy": draw(st.sampled_from(["fcfs", "sjf", "priority"])),
        "batching_mode": draw(st.sampled_from(["continuous", "continuous", "static", "dynamic"])),
        "max_queue_delay": draw(st.sampled_from([0.0, 16 * UNIT, 0.25])),
        "max_num_queued_reqs": draw(st.sampled_from([None, None, 2])),
        "watermark": draw(st.sampled_from([0.0, 0.0, 0.25])),
    }
    # From as few blocks as preempt all the time to more than are ever needed.
    least = -(-MAX_MODEL_LEN // knobs["block_size"])
    blocks = draw(st.sampled_from([least // 4 + 1, least // 2, least, 2 * least, 16 * least]))
    rng = random.Random(draw(st.integers(0, 2**32)))
    requests: list[LoadRequest] = []
    outputs: dict[str, list[int]] = {}
    now = 0
    recorded = draw(st.booleans())
    spread = draw(st.sampled_from([0, 3, 40, 400]))
    for number in range(draw(st.integers(1, 24))):
        now += rng.randint(0, spread)
        stem = rng.choice([(), *STEMS])
        if recorded and requests and rng.random() < 0.3:  # goes on from an answer
            before = rng.choice(requests)
            stem = (*before.token_ids, *outputs[before.request_id])[: MAX_MODEL_LEN - 30]
        prompt = (*stem, *(rng.randrange(WORDS) for _ in range(rng.randint(1, 12))))
        length = rng.choice([1, 2, rng.randint(1, 40), rng.randint(1, 110)])
        name = f"r{number}"
        requests.append(LoadRequest(name, now * UNIT, prompt, length))
        outputs[name] = [rng.randrange(WORDS) for _ in range(length)]
        if rng.random() < 0.1:  # the end of a record is missing
            outputs[name] = outputs[name][: length // 2]
    received = {
        r.request_id: rng.randint(0, len(r.token_ids) - 1) for r in requests if rng.random() < 0.1
    }
    factors = tuple(rng.choice([0.5, 1.0, 1.5, 4.0]) for _ in range(rng.randint(0, 12)))
    return Play(
        knobs,
        blocks,
        {
            "base": draw(st.integers(1, 9)),
            "row": draw(st.integers(0, 3)),
            "sequence": draw(st.integers(0, 2)),
            "pieces": tuple(draw(st.lists(st.integers(0, 40), min_size=1, max_size=3))),
            "host": draw(st.integers(0, 2)),
        },
        requests,
        outputs if recorded else None,
        received,
        draw(st.sampled_from([NO_TIMES, LoadTimes(gap=3 * UNIT, gap_sequence=UNIT)])),
        Pace(2.0, 64 * UNIT, factors) if factors else STEADY,
        sorted(rng.randint(0, now + 50) * UNIT for _ in range(rng.randint(0, 4))),
        draw(st.sampled_from([None, None, 20 * UNIT])),
    )


@dataclass
class Told:
    """What can be seen of an engine from outside."""

    records: list[RequestRecord]
    departures: list[float]
    now: float
    totals: dict[str, Any]
    outstanding: list[int]
    cached: list[int]
    blocks: tuple[int, int]


def told_by(play: Play, cost: SteppedCost) -> Told:
    config = EngineConfig(**play.knobs)
    shape = CacheShape(play.blocks, MAX_MODEL_LEN)
    engine = VirtualEngine(
        config, cost, shape, times=play.times, pace=play.pace, outputs=play.outputs
    )
    outstanding, cached = [], []
    moments: list[tuple[float, LoadRequest | None]] = [(look, None) for look in play.looks]
    moments += [(request.arrival_s, request) for request in play.requests]
    for moment, request in sorted(moments, key=lambda m: (m[0], m[1] is not None)):
        engine.run(moment)
        outstanding.append(engine.outstanding(moment))
        if request is not None:
            cached.append(engine.cached_tokens(request.token_ids))
            received = play.received.get(request.request_id, 0)
            engine.send(request, moment, received_tokens=received)
        engine.scheduler.check_integrity()
    if play.give_up is not None:
        engine.run(play.requests[-1].arrival_s + play.give_up)
        engine.give_up("too late")
    engine.run()
    assert not engine.has_unfinished
    engine.scheduler.check_integrity()
    cached += [engine.cached_tokens(request.token_ids) for request in play.requests]
    pool = engine.scheduler.pool
    return Told(
        engine.take_records(),
        engine.departures,
        engine.now,
        dataclasses.asdict(engine.totals),
        outstanding,
        cached,
        (pool.num_used, pool.num_cached),
    )


@given(plays())
@settings(max_examples=150, deadline=None)
def test_what_is_taken_at_once_is_what_single_steps_come_to(play: Play) -> None:
    stepped = told_by(play, SteppedCost(**play.cost))
    fast = told_by(play, LinedCost(**play.cost))
    assert fast == stepped


@given(plays())
@settings(max_examples=40, deadline=None)
def test_it_makes_no_difference_who_looks_meanwhile(play: Play) -> None:
    """A fleet runs its engines to every arrival of any of them; a lone engine only to its own."""
    cost = LinedCost(**play.cost)
    watched = told_by(dataclasses.replace(play, give_up=None), cost)
    alone = told_by(dataclasses.replace(play, give_up=None, looks=()), cost)
    assert (watched.records, watched.totals) == (alone.records, alone.totals)
