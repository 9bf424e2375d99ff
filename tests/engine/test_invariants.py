"""Random traffic against the engine's invariants.

1. Every request that enters leaves exactly once.
2. Every block is free, owned or cached; reference counts equal owners; an idle engine owns none.
3. What a request generates depends on nothing but the request.
4. No step exceeds its limits, and everything that was let in comes to its end.
5. Time never runs backwards.
"""

from __future__ import annotations

import contextlib
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from engine.batch import Batch, BatchResult
from engine.block_groups import BlockGroup
from engine.config import EngineConfig
from engine.engine import CacheShape, Engine
from engine.errors import ConfigError
from engine.output import RequestOutput
from engine.request import FinishReason, Request, SamplingParams
from engine.step_record import StepRecord
from tests.engine.fake_detokenizer import FakeDetokenizer, as_text
from tests.engine.fake_executor import (
    VOCABULARY,
    Deferred,
    FakeExecutor,
    FakeSpeculator,
    VirtualClock,
    next_token,
)

EOS = frozenset({5, 6})
STEMS = ([1, 2, 3, 4] * 12, [1, 2, 3, 4] * 4 + [7] * 24, [9] * 40)


class StrictExecutor(FakeExecutor):
    """Also checks every batch that it is given."""

    engine: Engine
    max_model_len: int

    def execute(self, batch: Batch) -> BatchResult:
        self.check(batch)
        return super().execute(batch)

    def launch(self, batch: Batch) -> Deferred:
        self.check(batch)
        return super().launch(batch)

    def check(self, batch: Batch) -> None:
        config = self.engine.config
        pool = self.engine.pool
        assert 1 <= len(batch.sequences) <= config.max_num_seqs
        assert batch.num_tokens <= config.max_num_batched_tokens
        assert len({id(s.request) for s in batch.sequences}) == len(batch.sequences)
        written: set[int] = set()
        for i, s in enumerate(batch.sequences):
            request = s.request
            assert s.start == request.num_computed_tokens
            assert s.num_tokens >= 1
            assert s.samples is (s.known == len(request.token_ids))
            assert s.known < self.max_model_len
            assert s.end <= self.max_model_len
            if i < batch.num_decodes:
                assert s.num_tokens == 1 + s.num_drafted
                assert s.samples
            elif config.enable_chunked_prefill and config.long_prefill_token_threshold:
                assert s.num_tokens <= config.long_prefill_token_threshold
            assert request.tables.capacity >= s.end
            for table in request.tables.groups:
                for position in range(s.start, s.end):
                    block = table[position // pool.block_size]
                    assert pool._references[block] == 1, "a shared block is written"
                    written.add(block * pool.block_size + position % pool.block_size)
        groups = len(pool.windows)
        assert len(written) == batch.num_tokens * groups, "two sequences write one slot"
        self.engine.scheduler.check_integrity()


def generate(request: Request) -> tuple[list[int], str, FinishReason]:
    """What the request must generate: computed alone, token by token, from its definition."""
    sampling = request.sampling
    prompt = request.token_ids[: request.num_prompt_tokens]
    tokens: list[int] = []
    while True:
        tokens.append(next_token([*prompt, *tokens]))
        if len(tokens) >= sampling.min_tokens:
            ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else EOS)
            if tokens[-1] in ends:
                return tokens, as_text(tokens[:-1]), FinishReason.STOP
            text = as_text(tokens)
            # A stop text must not have been complete before this token.
            from_ = [text.find(s, max(0, len(text) - 1 - len(s))) for s in sampling.stop]
            found = [at for at in from_ if at >= 0]
            if found:
                return tokens, text[: min(found)], FinishReason.STOP
        if len(prompt) + len(tokens) >= request.max_total_tokens:
            return tokens, as_text(tokens), FinishReason.LENGTH


live_knobs = st.fixed_dictionaries(
    {},
    optional={
        "max_num_seqs": st.integers(1, 6),
        "max_num_batched_tokens": st.integers(6, 60),
        "enable_chunked_prefill": st.booleans(),
        "enable_prefix_caching": st.booleans(),
        "long_prefill_token_threshold": st.sampled_from([0, 1, 5, 16]),
        "scheduling_policy": st.sampled_from(["fcfs", "priority", "sjf"]),
        "batching_mode": st.sampled_from(["continuous", "continuous", "static", "dynamic"]),
        "max_queue_delay": st.sampled_from([0.0, 0.002, 1.0]),
        "max_num_queued_reqs": st.sampled_from([None, None, 1, 4]),
        "watermark": st.sampled_from([0.0, 0.1, 0.5]),
    },
)
samplings = st.builds(
    SamplingParams,
    temperature=st.just(0.0),
    max_tokens=st.one_of(st.none(), st.integers(3, 40)),
    min_tokens=st.integers(0, 3),
    ignore_eos=st.booleans(),
    stop_token_ids=st.lists(st.integers(0, VOCABULARY - 1), max_size=2),
    stop=st.lists(st.text("abcde", min_size=1, max_size=3), max_size=2),
)
prompts = st.builds(
    lambda stem, length, tail: stem[:length] + tail,
    st.sampled_from(STEMS),
    st.integers(0, 40),
    st.lists(st.integers(0, 3), max_size=12),
)


class EngineMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.requests: list[Request] = []
        self.outputs: dict[Request, list[RequestOutput]] = {}
        self.records: list[StepRecord] = []

    @initialize(
        knobs=live_knobs,
        block_size=st.sampled_from([8, 16]),
        num_blocks=st.integers(2, 14),
        max_model_len=st.sampled_from([40, 90]),
        drafted=st.sampled_from([0, 0, 3, 9]),
        trees=st.booleans(),
        windows=st.sampled_from([(0,), (0,), (0,), (13,), (0, 10), (0, 20, 20, 20), (7, 24)]),
        pipelined=st.booleans(),
    )
    def start(
        self,
        knobs: dict[str, Any],
        block_size: int,
        num_blocks: int,
        max_model_len: int,
        drafted: int,
        trees: bool = False,
        windows: tuple[int, ...] = (0,),
        pipelined: bool = False,
    ) -> None:
        knobs = {"max_num_seqs": 4, "max_num_batched_tokens": 32, **knobs}
        config = EngineConfig.from_mapping({"block_size": block_size, **knobs})
        self.clock = VirtualClock()
        self.executor = StrictExecutor(num_blocks, block_size, self.clock, windows)
        groups = tuple(BlockGroup(window, (i,)) for i, window in enumerate(windows))
        self.executor.keep_batches = False
        self.executor.pipelined = pipelined
        if drafted:  # trees are for models of one group without window
            trees = trees and windows == (0,)
            self.executor.speculator = FakeSpeculator(drafted, trees=trees)
        self.executor.max_model_len = max_model_len
        self.num_blocks = num_blocks

        def rebuild(new: EngineConfig) -> CacheShape:
            self.executor.reshape(self.num_blocks, new.block_size)
            self.executor.max_model_len = new.max_model_len or 90
            return CacheShape(self.num_blocks, self.executor.max_model_len, groups)

        self.detokenizer = FakeDetokenizer()
        self.engine = self.executor.engine = Engine(
            config,
            self.executor,
            CacheShape(num_blocks, max_model_len, groups),
            eos_token_ids=EOS,
            vocab_size=VOCABULARY,
            clock=self.clock,
            detokenizer=self.detokenizer,
            rebuild_cache=rebuild,
            on_step=self.records.append,
        )

    def take(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            before = self.outputs.setdefault(output.request, [])
            assert not before or before[-1].finish_reason is None, "something followed the end"
            before.append(output)

    def step_once(self) -> None:
        wakeup = self.engine.next_wakeup()
        if wakeup is not None:
            self.clock.now = max(self.clock.now, wakeup)
        self.take(self.engine.step())
        self.engine.scheduler.check_integrity()

    @rule(jobs=st.lists(st.tuples(prompts, samplings, st.integers(0, 2)), min_size=2, max_size=6))
    def add_several(self, jobs: list[tuple[list[int], SamplingParams, int]]) -> None:
        for prompt, sampling, priority in jobs:
            self.add(prompt, sampling, priority)

    @rule(prompt=prompts, sampling=samplings, priority=st.integers(0, 2))
    def add(self, prompt: list[int], sampling: SamplingParams, priority: int) -> None:
        name = f"r{len(self.requests)}"
        self.requests.append(self.engine.add(name, prompt, sampling, priority=priority))

    @rule(count=st.integers(1, 12))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.step_once()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.engine.abort(data.draw(st.sampled_from(self.requests)).request_id)

    @rule(certainly=st.integers(0, 4))
    def abort_all(self, certainly: int) -> None:
        if certainly == 4:
            self.engine.abort_all()

    @rule(
        error=st.sampled_from([RuntimeError("broken"), KeyboardInterrupt()]),
        at_launch=st.booleans(),
    )
    def fail(self, error: BaseException, at_launch: bool) -> None:
        self.executor.fail_next, self.executor.fail_at_launch = error, at_launch
        with contextlib.suppress(RuntimeError, KeyboardInterrupt):
            self.take(self.engine.step())
        self.executor.fail_next = None
        self.engine.scheduler.check_integrity()

    @rule(knobs=live_knobs)
    def change_live_knobs(self, knobs: dict[str, Any]) -> None:
        before = self.engine.config
        try:
            self.engine.reconfigure(**knobs)
        except ConfigError:
            assert self.engine.config == before

    @rule(
        block_size=st.sampled_from([8, 16]),
        num_blocks=st.integers(2, 14),
        max_model_len=st.sampled_from([30, 90]),
        memory=st.integers(1, 1 << 30),
    )
    def change_cache(
        self, block_size: int, num_blocks: int, max_model_len: int, memory: int
    ) -> None:
        self.num_blocks = num_blocks
        try:
            self.engine.reconfigure(
                block_size=block_size, max_model_len=max_model_len, kv_cache_memory_bytes=memory
            )
        except ConfigError:  # chunking is off, and the limit of a step below the model's length
            assert not self.engine.config.enable_chunked_prefill
            self.num_blocks = self.engine.pool.num_blocks

    @rule()
    def clear_prefix_cache(self) -> None:
        self.engine.clear_prefix_cache()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(5000):
            if not self.engine.has_unfinished:
                break
            self.step_once()
        assert not self.engine.has_unfinished, "a request was never served"
        assert self.engine.pool.num_used == 0
        assert self.detokenizer.open == {}
        assert set(self.outputs) == set(self.requests)
        for request, outputs in self.outputs.items():
            self.check(request, outputs)
        for earlier, later in pairwise(self.records):
            assert later.start >= earlier.start + earlier.device_seconds - 1e-9

    def check(self, request: Request, outputs: list[RequestOutput]) -> None:
        tokens = [t for output in outputs for t in output.token_ids]
        text = "".join(output.text for output in outputs)
        reason = outputs[-1].finish_reason
        assert tokens == request.output_token_ids
        assert reason is request.finish_reason is not None
        assert (request.tables.num_owned, reason is FinishReason.REFUSED) == (
            0,
            reason is FinishReason.REFUSED and bool(request.refusal),
        )
        if not request.max_total_tokens:
            assert reason in (FinishReason.REFUSED, FinishReason.ABORT)
            assert tokens == []
            return
        expected, expected_text, expected_reason = generate(request)
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            assert (tokens, text, reason) == (expected, expected_text, expected_reason)
        else:
            # A length limit that a smaller cache brought may lie behind what was generated.
            common = min(len(tokens), len(expected))
            assert tokens[:common] == expected[:common]
            assert text == as_text(tokens)


EngineMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=30, deadline=None, database=None
)
TestEngine = EngineMachine.TestCase


def heavy_load(
    windows: tuple[int, ...],
    num_blocks: int,
    max_tokens: int = 30,
    pipelined: bool = False,
    drafted: int = 0,
    trees: bool = False,
    **knobs: object,
) -> EngineMachine:
    """Forty requests with common prefixes, one a step, on a cache that holds few of them."""
    machine = EngineMachine()
    machine.start(
        {"max_num_seqs": 6, **knobs},
        block_size=8,
        num_blocks=num_blocks,
        max_model_len=90,
        drafted=drafted,
        trees=trees,
        windows=windows,
        pipelined=pipelined,
    )
    for i in range(40):
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        machine.add([*STEMS[i % 3][: i % 37 + 1], i], sampling, i % 3)
        machine.step(1)
    machine.teardown()
    assert all(r.num_output_tokens == max_tokens for r in machine.requests)
    return machine


@pytest.mark.parametrize("policy", ["fcfs", "priority", "sjf"])
@pytest.mark.parametrize("mode", ["continuous", "static", "dynamic"])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_tiny_cache_under_heavy_load_serves_all_alike(
    policy: str, mode: str, prefix_caching: bool
) -> None:
    machine = heavy_load(
        (0,),
        12,
        scheduling_policy=policy,
        batching_mode=mode,
        enable_prefix_caching=prefix_caching,
    )
    assert sum(r.num_preemptions for r in machine.requests) > 0
    assert (machine.engine.pool.hit_tokens > 0) is prefix_caching


@pytest.mark.parametrize("policy", ["fcfs", "priority", "sjf"])
@pytest.mark.parametrize("trees", [False, True])
@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize("max_num_batched_tokens", [7, 32])
def test_drafts_on_a_tiny_cache_change_no_output(
    policy: str, trees: bool, pipelined: bool, max_num_batched_tokens: int
) -> None:
    machine = heavy_load(
        (0,),
        12,
        pipelined=pipelined,
        drafted=6,
        trees=trees,
        scheduling_policy=policy,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    drafted = sum(record.drafted_tokens for record in machine.records)
    accepted = sum(record.accepted_tokens for record in machine.records)
    speculator = machine.executor.speculator
    assert speculator is not None
    assert drafted > accepted == speculator.observed > 50
    assert sum(r.num_preemptions for r in machine.requests) > 0
    assert machine.engine.pool.hit_tokens > 0
    assert set(speculator.forgotten) == {r.request_id for r in machine.requests}
    for record in machine.records:
        assert record.accepted_tokens == sum(record.accepted_by_depth)
        assert len(record.accepted_by_depth) == len(record.drafted_by_depth)
        deeper = pairwise(record.drafted_by_depth)
        assert all(first >= second for first, second in deeper)


@pytest.mark.parametrize(("windows", "num_blocks"), [((12,), 5), ((0, 12), 15), ((0, 5, 5), 16)])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_drafts_beside_windows(
    windows: tuple[int, ...], num_blocks: int, prefix_caching: bool
) -> None:
    machine = heavy_load(windows, num_blocks, drafted=6, enable_prefix_caching=prefix_caching)
    assert sum(record.accepted_tokens for record in machine.records) > 50


@pytest.mark.parametrize(
    ("windows", "num_blocks"), [((12,), 4), ((0, 12), 14), ((0, 5, 5), 15), ((9, 20), 8)]
)
@pytest.mark.parametrize("policy", ["fcfs", "priority", "sjf"])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_windows_under_heavy_load(
    windows: tuple[int, ...], num_blocks: int, policy: str, prefix_caching: bool
) -> None:
    """Caches that, but for the windows, would not even hold one of the sequences."""
    machine = heavy_load(
        windows,
        num_blocks,
        pipelined=policy == "fcfs",
        scheduling_policy=policy,
        enable_prefix_caching=prefix_caching,
    )
    assert len(windows) * -(-67 // 8) > num_blocks
    assert sum(r.num_preemptions for r in machine.requests) > 0
    assert (machine.engine.pool.hit_tokens > 0) is prefix_caching
