"""A virtual engine drafts, verifies and schedules step by step as the engine itself does.

The engine looks tokens up with its own proposer; the virtual one has traces of the same answers.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from autotune.predict.draft_traces import traces
from autotune.predict.drafting import DraftCost, DraftProfile
from autotune.predict.step_cost import StepWork
from autotune.predict.step_times import DecodeLine
from autotune.predict.virtual_engine import VirtualEngine
from autotune.predict.virtual_speculation import VirtualCosts
from autotune.workload.materialise import LoadRequest
from engine.batch import Batch, BatchResult
from engine.config import EngineConfig
from engine.engine import CacheShape, Engine
from engine.request import FinishReason, SamplingParams
from engine.speculate.draft_lengths import DraftLengths
from engine.speculate.ngram import NgramProposer
from engine.speculate.speculator import Speculator
from engine.step_record import StepRecord
from tests.engine.fake_executor import VirtualClock

MAX_MODEL_LEN = 160
FREE = DraftCost()
UNTOLD = ("scheduler_seconds",)


class RowsCost:
    """Dyadic seconds, so that sums come out the same in any order."""

    def __init__(self, base: int, row: int) -> None:
        self.base, self.row = base, row

    def decode_line(self, sequences: int) -> DecodeLine | None:
        return None

    def device_seconds(self, work: StepWork) -> float:
        return 2.0**-12 * (self.base + self.row * work.rows)

    def host_seconds(self, work: StepWork) -> float:
        return 0.0


def next_token(context: Sequence[int]) -> int:
    """Goes round, in a way that drafts often foresee and now and then do not."""
    return (3 * context[-1] + context[-2] + (len(context) % 23 == 0)) % 7


class Verifying:
    """An executor of a model that always goes on by `next_token`."""

    def __init__(self, cost: RowsCost, clock: VirtualClock, config: EngineConfig) -> None:
        self.clock = clock
        self.cost = cost
        self.batches: list[list[tuple[str, int, int, int]]] = []
        lengths = DraftLengths(
            VirtualCosts(cost, DraftProfile(cost=FREE)),
            costs_device=False,
        )
        self.speculator = Speculator(NgramProposer(config), lengths, clock)

    def execute(self, batch: Batch) -> BatchResult:
        self.batches.append(decision(batch))
        rows: list[list[int]] = []
        for s in batch.sequences:
            rows.append([])
            if not s.samples:
                continue
            context = list(s.request.token_ids[: s.end - s.num_drafted])
            drafted = [] if s.draft is None else list(s.draft.token_ids)
            while True:
                token = next_token(context)
                rows[-1].append(token)
                context.append(token)
                if not drafted or drafted.pop(0) != token:
                    break
        seconds = self.cost.device_seconds(StepWork.of_batch(batch))
        self.clock.now += seconds
        return BatchResult(rows, seconds)


def decision(batch: Batch) -> list[tuple[str, int, int, int]]:
    return [(s.request.request_id, s.start, s.num_tokens, s.num_drafted) for s in batch.sequences]


class Overheard(VirtualEngine):
    """Also keeps the batches that its scheduler chose."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batches: list[list[tuple[str, int, int, int]]] = []
        schedule = self.scheduler.schedule

        def overhear(now: float) -> Batch:
            batch = schedule(now)
            if batch.sequences:
                self.batches.append(decision(batch))
            return batch

        self.scheduler.schedule = overhear  # type: ignore[method-assign]


def served(
    requests: Sequence[LoadRequest], blocks: int, config: EngineConfig, cost: RowsCost
) -> tuple[Verifying, list[StepRecord], dict[str, list[int]], dict[str, float]]:
    """What the engine does with a load."""
    clock = VirtualClock()
    executor = Verifying(cost, clock, config)
    steps: list[StepRecord] = []
    engine = Engine(
        config, executor, CacheShape(blocks, MAX_MODEL_LEN), clock=clock, on_step=steps.append
    )
    outputs: dict[str, list[int]] = {}
    finished: dict[str, float] = {}
    left = list(requests)
    while left or engine.has_unfinished:
        while left and left[0].arrival_s <= clock.now:
            one = left.pop(0)
            sampling = SamplingParams(
                temperature=0.0, max_tokens=one.output_tokens, ignore_eos=True
            )
            engine.add(one.request_id, one.token_ids, sampling, arrival=one.arrival_s)
        if not engine.has_unfinished:
            clock.now = left[0].arrival_s
            continue
        for output in engine.step():
            outputs.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish_reason is FinishReason.LENGTH:
                finished[output.request_id] = clock.now
        engine.scheduler.check_integrity()
    return executor, steps, outputs, finished


def told(step: StepRecord) -> Mapping[str, Any]:
    return {k: v for k, v in dataclasses.asdict(step).items() if k not in UNTOLD}


@given(
    blocks=st.sampled_from([20, 24, 40, 200]),
    knobs=st.fixed_dictionaries(
        {
            "block_size": st.sampled_from([8, 16]),
            "max_num_seqs": st.integers(1, 8),
            "max_num_batched_tokens": st.sampled_from([9, 16, 33, 128]),
            "enable_prefix_caching": st.booleans(),
            "scheduling_policy": st.sampled_from(["fcfs", "sjf"]),
            "watermark": st.sampled_from([0.0, 0.0, 0.2]),
            "num_speculative_tokens": st.integers(1, 8),
            "speculative_adaptive": st.booleans(),
            "prompt_lookup_min": st.integers(1, 2),
            "prompt_lookup_max": st.integers(2, 4),
        }
    ),
    base=st.integers(1, 40),
    row=st.integers(0, 4),
    count=st.integers(1, 20),
    spread=st.sampled_from([0, 40, 1000]),
    seed=st.integers(0, 2**32),
)
@example(  # somebody is preempted whose dropped draft is being judged
    blocks=24,
    knobs={
        "block_size": 8,
        "max_num_seqs": 3,
        "max_num_batched_tokens": 16,
        "enable_prefix_caching": False,
        "scheduling_policy": "sjf",
        "watermark": 0.0,
        "num_speculative_tokens": 2,
        "speculative_adaptive": True,
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 2,
    },
    base=11,
    row=1,
    count=4,
    spread=40,
    seed=148,
)
@settings(max_examples=40, deadline=None)
def test_it_speculates_as_the_engine_does(
    blocks: int,
    knobs: dict[str, Any],
    base: int,
    row: int,
    count: int,
    spread: int,
    seed: int,
) -> None:
    rng = random.Random(seed)
    requests, now = [], 0
    for number in range(count):
        now += rng.randint(0, spread)
        prompt = tuple(rng.randrange(7) for _ in range(rng.randint(2, 60)))
        requests.append(LoadRequest(f"{number}", now * 2.0**-12, prompt, rng.randint(1, 80)))
    config = EngineConfig.from_mapping({**knobs, "speculative_method": "ngram"})
    cost = RowsCost(base, row)
    executor, steps, outputs, finished = served(requests, blocks, config, cost)
    for one in requests:
        expected = list(one.token_ids)
        for _ in range(one.output_tokens):
            expected.append(next_token(expected))
        assert outputs[one.request_id] == expected[len(one.token_ids) :]

    texts = [(r.request_id, r.token_ids, outputs[r.request_id]) for r in requests]
    known = DraftProfile(cost=FREE, traces=traces(texts, config))
    played: list[StepRecord] = []
    engine = Overheard(
        config,
        cost,
        CacheShape(blocks, MAX_MODEL_LEN),
        drafts=known,
        outputs=outputs,
        on_step=played.append,
    )
    for one in requests:
        engine.run(one.arrival_s)
        engine.send(one, one.arrival_s)
    engine.run()
    engine.scheduler.check_integrity()
    assert engine.batches == executor.batches
    assert [told(step) for step in played] == [told(step) for step in steps]
    records = {r.request_id: r for r in engine.take_records()}
    assert {name: r.token_times[-1] for name, r in records.items()} == finished
    for one in requests:
        assert len(records[one.request_id].token_times) == one.output_tokens
    drafts = engine.totals.drafts
    assert drafts.drafted_tokens == sum(step.drafted_tokens for step in steps)
    assert drafts.accepted_tokens == sum(step.accepted_tokens for step in steps)


def test_drafts_are_found_and_rejected_in_these_loads() -> None:
    """So that the test above tells something."""
    config = EngineConfig(speculative_method="ngram", block_size=8, speculative_adaptive=False)
    requests = [LoadRequest(str(i), 0.0, (i, 1, 2), 80) for i in range(5)]
    _, steps, _, _ = served(requests, 200, config, RowsCost(10, 1))
    drafted = sum(step.drafted_tokens for step in steps)
    accepted = sum(step.accepted_tokens for step in steps)
    assert 0.3 * drafted < accepted < 0.95 * drafted
