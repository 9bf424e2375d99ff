"""The cache during a load: occupancy, reuse, pressure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.profiling.evidence import LoadEvidence
from autotune.profiling.kv_cache import attainable_hit_rate, kv_cache, seats
from autotune.profiling.step_columns import StepColumns
from engine.admission import refusal_for_size
from engine.blocks import BlockPool
from engine.config import EngineConfig
from engine.request import Request, SamplingParams
from tests.autotune.profiling.loads import MODEL, LinearCost, poisson, request, served, step

CONFIG = EngineConfig(model="test", block_size=16, max_num_seqs=8, max_num_batched_tokens=64)


def through_the_pool(prompts: Sequence[Sequence[int]], block_size: int) -> float:
    """Hits of the engine's own cache, unbounded, one prompt after another."""
    blocks = sum(-(-len(p) // block_size) for p in prompts) + 1
    pool = BlockPool(blocks, block_size)
    hits = 0
    for prompt in prompts:
        tables = pool.new_tables()
        prefix = pool.match_prefix(tables, list(prompt))
        hits += prefix.num_blocks * block_size
        assert pool.allocate(tables, prefix, len(prompt))
        pool.register(tables, list(prompt), len(prompt))
        pool.free(tables)
    return hits / sum(map(len, prompts))


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2),  # which of three texts the prompt begins with
            st.integers(0, 40),  # how much of it
            st.lists(st.integers(0, 1), max_size=12),  # what follows
        ).filter(lambda p: p[1] + len(p[2]) > 0),
        min_size=1,
        max_size=12,
    ),
    st.sampled_from([1, 4, 8, 16]),
)
@settings(max_examples=200, deadline=None)
def test_the_attainable_hit_rate_is_that_of_the_pool_without_bounds(
    parts: list[tuple[int, int, list[int]]], block_size: int
) -> None:
    texts = [[10 * which + i % 7 for i in range(40)] for which in range(3)]
    prompts = [tuple(texts[which][:length] + rest) for which, length, rest in parts]
    found = attainable_hit_rate(prompts, block_size)
    assert found == pytest.approx(through_the_pool(prompts, block_size))


def test_a_repeated_prompt_hits_all_but_the_block_of_its_last_token() -> None:
    assert attainable_hit_rate([range(32), range(32)], 16) == 16 / 64
    assert attainable_hit_rate([range(33), range(33)], 16) == 32 / 66
    assert attainable_hit_rate([], 16) is None


def test_what_a_real_cache_finds_comes_near_what_is_attainable() -> None:
    # Shared 160 tokens and slow arrivals: each finds what the one before has left.
    evidence, config = served(poisson(2, 40, seed=1, shared=160), LinearCost())
    cache, partial = kv_cache(evidence, StepColumns.of(evidence.steps), config, MODEL)
    assert not partial
    assert cache.hit_rate == pytest.approx(
        sum(r.cached_tokens for r in evidence.requests)
        / sum(r.input_tokens for r in evidence.requests)
    )
    assert cache.hit_rate is not None
    assert cache.hit_rate > 0.3
    assert cache.attainable_hit_rate == pytest.approx(cache.hit_rate)


def test_without_prefix_caching_the_attainable_rate_still_says_what_is_missed() -> None:
    evidence, config = served(
        poisson(20, 40, seed=1, shared=160), LinearCost(), enable_prefix_caching=False
    )
    cache, _ = kv_cache(evidence, StepColumns.of(evidence.steps), config, MODEL)
    assert cache.hit_rate == 0.0
    assert cache.attainable_hit_rate is not None
    assert cache.attainable_hit_rate > 0.3


def test_occupancy_counts_blocks_over_the_steps_time() -> None:
    steps = [
        step(0.0, 3.0, blocks_used=20, used_tokens=300),
        step(3.0, 1.0, blocks_used=60, used_tokens=900),
    ]
    evidence = LoadEvidence([request()], steps)
    cache, partial = kv_cache(evidence, StepColumns.of(steps), CONFIG, MODEL)
    assert cache.occupancy_mean == pytest.approx((3 * 0.2 + 0.6) / 4)
    assert cache.occupancy_peak == pytest.approx(0.6)
    assert cache.total_bytes == 100 * 128
    # 20 and 40 of 320 and 960 slots are empty.
    assert cache.fragmentation == pytest.approx((3 * 20 + 60) / (3 * 320 + 960))
    assert cache.attainable_hit_rate is None
    assert any("hold no prompts" in sentence for sentence in partial)


def test_shared_blocks_do_not_hide_what_last_blocks_leave_empty() -> None:
    """Each request wastes on average half a block, whatever it shares with others."""
    shared = poisson(100, 150, seed=4, shared=320, inputs=(1, 40), outputs=(20, 60))
    evidence, config = served(shared, LinearCost(), block_size=16)
    columns = StepColumns.of(evidence.steps)
    cache, _ = kv_cache(evidence, columns, config, MODEL)
    assert cache.hit_rate is not None
    assert cache.hit_rate > 0.5
    empty = columns.seconds @ (columns.running * 16 / 2)
    owned = columns.seconds @ (columns.blocks_used * 16)
    assert cache.fragmentation == pytest.approx(float(empty / owned), rel=0.15)


def test_preempted_prompts_count_as_computed_again() -> None:
    requests = poisson(400, 60, seed=2, inputs=(30, 60), outputs=(40, 80))
    evidence, config = served(requests, LinearCost(), num_blocks=40, enable_prefix_caching=False)
    cache, _ = kv_cache(evidence, StepColumns.of(evidence.steps), config, MODEL)
    preempted = [r for r in evidence.requests if r.preemptions]
    assert cache.preemptions == sum(r.preemptions for r in preempted) > 0
    assert cache.preempted_share == len(preempted) / 60
    computed = sum(s.prefill_tokens for s in evidence.steps)
    needed = sum(r.input_tokens for r in evidence.requests)
    assert computed > needed
    assert cache.recomputed_share == pytest.approx(1 - needed / computed)
    assert cache.occupancy_peak == 1.0


def test_only_waiting_with_free_seats_and_budget_is_for_want_of_blocks() -> None:
    waiting = {"queue_length": 3, "decode_sequences": 4}
    steps = [
        step(0.0, 1.0, running=4, **waiting),  # blocked
        step(1.0, 1.0, running=8, **waiting),  # no seat
        step(2.0, 1.0, running=4, **(waiting | {"prefill_tokens": 60})),  # no budget
        step(3.0, 1.0, running=4, decode_sequences=4),  # nobody waits
    ]
    evidence = LoadEvidence([request()], steps)
    cache, _ = kv_cache(evidence, StepColumns.of(steps), CONFIG, MODEL)
    assert cache.blocked_share == pytest.approx(0.25)
    static = CONFIG.replace(batching_mode="static")
    cache, _ = kv_cache(evidence, StepColumns.of(steps), static, MODEL)
    assert cache.blocked_share == 0.0


def test_a_long_prompt_that_waits_for_a_whole_step_is_not_blocked() -> None:
    whole = CONFIG.replace(enable_chunked_prefill=False)
    steps = [step(0.0, 1.0, running=4, queue_length=1, decode_sequences=4)]
    long, short = request(input_tokens=62), request(input_tokens=50)
    for one, share in ((long, 0.0), (short, 1.0)):
        cache, _ = kv_cache(LoadEvidence([one], steps), StepColumns.of(steps), whole, MODEL)
        assert cache.blocked_share == share


def test_refusals_for_size_are_known_by_what_the_engine_says() -> None:
    pool = BlockPool(4, 16)
    cases = [(200, 10, 4096), (5000, 10, 4096)]
    refused = []
    for index, (tokens, answer, longest) in enumerate(cases):
        asked = Request(str(index), [0] * tokens, SamplingParams(max_tokens=answer), 0.0)
        reason = refusal_for_size(asked, pool, longest)
        refused.append(request(str(index), token_times=(), outcome="refused", reason=reason))
    full = "3 requests wait already (max_num_queued_reqs=3); try again later"
    refused.append(request("full", token_times=(), outcome="refused", reason=full))
    cache, _ = kv_cache(LoadEvidence(refused, []), StepColumns.of([]), CONFIG, MODEL)
    assert cache.refused_for_size == 2


def test_seats_are_those_that_a_full_engine_has() -> None:
    """Against the engine itself, with more requests than its cache holds."""
    requests = poisson(1e4, 300, seed=7, inputs=(50, 150), outputs=(10, 60))
    evidence, config = served(requests, LinearCost(), num_blocks=100, block_size=16)
    columns = StepColumns.of(evidence.steps)
    busy = columns.queue > 20
    running = float(np.average(columns.running[busy], weights=columns.seconds[busy]))
    found = seats(evidence.requests, 100, config.block_size)
    assert found == pytest.approx(running, rel=0.15)
    assert seats([request(token_times=())], 100, 16) is None
