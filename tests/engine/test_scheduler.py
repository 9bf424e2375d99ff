import subprocess
import sys

import pytest

from engine.attention_work import attention_work
from engine.batch import BatchResult
from engine.block_groups import ONE_GROUP
from engine.block_tables import BlockTables, Prefix
from engine.request import FinishReason, RequestState
from tests.engine.scheduling import (
    EOS,
    STEP,
    answer,
    finish_all,
    make_request,
    make_scheduler,
    shape,
    step,
)


def test_the_scheduler_imports_no_torch() -> None:
    code = (
        "import sys, engine.scheduler, engine.engine; "
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# What a step computes


def test_prompts_are_chunked_and_mixed_with_decodes() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=16, max_num_seqs=4)
    scheduler.add(make_request("a", 8))
    scheduler.add(make_request("b", 30))
    assert step(scheduler) == [("a", 0, 8), ("b", 0, 8)]
    scheduler.add(make_request("c", 5))
    assert step(scheduler) == [("a", 8, 1), ("b", 8, 15)]
    assert step(scheduler) == [("a", 9, 1), ("b", 23, 7), ("c", 0, 5)]
    assert step(scheduler) == [("a", 10, 1), ("b", 30, 1), ("c", 5, 1)]


def test_only_the_chunk_that_ends_a_prompt_samples() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=16, max_num_seqs=4)
    scheduler.add(make_request("a", 20))
    first = scheduler.schedule(0.0)
    assert [s.samples for s in first.sequences] == [False]
    assert (first.num_decodes, first.num_tokens) == (0, 16)
    assert attention_work(first, ONE_GROUP, uniform=True) == (16, 16, 16 * 17 // 2)
    scheduler.update(first, answer(first))
    second = scheduler.schedule(0.0)
    assert [s.samples for s in second.sequences] == [True]
    assert second.num_tokens == 4
    assert attention_work(second, ONE_GROUP, uniform=True) == (20, 20, 4 * 16 + 4 * 5 // 2)


def test_without_chunking_a_prompt_waits_for_a_step_with_room() -> None:
    scheduler = make_scheduler(
        max_num_batched_tokens=16, max_num_seqs=4, enable_chunked_prefill=False
    )
    scheduler.add(make_request("a", 10))
    scheduler.add(make_request("b", 10))
    assert step(scheduler) == [("a", 0, 10)]
    assert step(scheduler) == [("a", 10, 1), ("b", 0, 10)]


def test_a_long_prompt_leaves_room_for_others() -> None:
    scheduler = make_scheduler(
        max_num_batched_tokens=16, max_num_seqs=4, long_prefill_token_threshold=6
    )
    scheduler.add(make_request("a", 30))
    scheduler.add(make_request("b", 9))
    assert step(scheduler) == [("a", 0, 6), ("b", 0, 6)]
    assert step(scheduler) == [("a", 6, 6), ("b", 6, 3)]


def test_a_step_that_did_not_happen_is_scheduled_again_alike() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=16, max_num_seqs=4)
    for name in "abc":
        scheduler.add(make_request(name, 12))
    step(scheduler)
    batch = scheduler.schedule(0.0)
    again = scheduler.schedule(0.0)
    assert shape(again) == shape(batch)
    scheduler.check_integrity()
    scheduler.update(again, answer(again))
    assert sorted(finish_all(scheduler)) == ["a", "b", "c"]


def test_a_cached_prefix_is_not_computed_again() -> None:
    scheduler = make_scheduler()
    prompt = [2] * 20
    scheduler.add(make_request("a", prompt))
    finish_all(scheduler)
    second = make_request("b", prompt)
    scheduler.add(second)
    assert step(scheduler) == [("b", 16, 4)]
    assert second.num_cached_tokens == 16
    assert scheduler.pool.stats.hit_tokens == 16


# How sequences end


@pytest.mark.parametrize(
    ("sampling", "token", "output", "reason"),
    [
        ({}, EOS, 1, FinishReason.STOP),
        ({"ignore_eos": True}, EOS, 4, FinishReason.LENGTH),
        ({"min_tokens": 3}, EOS, 3, FinishReason.STOP),
        ({"stop_token_ids": [7, 8]}, 8, 1, FinishReason.STOP),
        ({"stop_token_ids": [7, 8], "ignore_eos": True}, 8, 1, FinishReason.STOP),
        ({"stop_token_ids": [7, 8], "min_tokens": 2}, 8, 2, FinishReason.STOP),
        ({"stop_token_ids": [7, 8]}, 9, 4, FinishReason.LENGTH),
        # At the length limit an end token still is what ended it.
        ({"min_tokens": 4}, EOS, 4, FinishReason.STOP),
    ],
)
def test_end_conditions(
    sampling: dict[str, object], token: int, output: int, reason: FinishReason
) -> None:
    scheduler = make_scheduler()
    request = make_request("a", 5, 4, **sampling)  # type: ignore[arg-type]
    scheduler.add(request)
    while scheduler.num_unfinished:
        step(scheduler, token=token)
    assert request.num_output_tokens == output
    assert request.finish_reason is reason
    assert scheduler.pool.num_used == 0


def test_several_tokens_of_one_step_end_where_one_by_one_would() -> None:
    scheduler = make_scheduler()
    stopped, cut = make_request("a", 5, 9), make_request("b", 5, 2)
    scheduler.add(stopped)
    scheduler.add(cut)
    batch = scheduler.schedule(0.0)
    finished = scheduler.update(batch, BatchResult([[3, EOS, 4], [5, 6, 7]], STEP))
    assert finished == [stopped, cut]
    assert stopped.output_token_ids == [3, EOS]
    assert cut.output_token_ids == [5, 6]


def test_several_tokens_of_one_step_are_all_computed_next() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 7, 9))
    batch = scheduler.schedule(0.0)
    scheduler.update(batch, BatchResult([[3, 4, 5]], STEP))
    # The tokens cross into a second block, which must be there before they are computed.
    batch = scheduler.schedule(0.0)
    assert shape(batch) == [("a", 7, 3)]
    assert (batch.num_decodes, batch.sequences[0].samples) == (0, True)
    assert len(batch.sequences[0].request.tables.groups[0]) == 2


def test_a_request_aborted_while_its_step_ran_takes_nothing_in() -> None:
    scheduler = make_scheduler()
    gone, stays = make_request("a"), make_request("b")
    scheduler.add(gone)
    scheduler.add(stays)
    batch = scheduler.schedule(0.0)
    assert scheduler.abort("a") is gone
    assert scheduler.update(batch, answer(batch)) == []
    assert gone.output_token_ids == []
    assert gone.finish_reason is FinishReason.ABORT
    assert finish_all(scheduler) == ["b"]
    assert scheduler.abort("a") is None
    assert not scheduler.finish(gone, FinishReason.STOP)
    assert gone.finish_reason is FinishReason.ABORT


def test_aborted_requests_leave_the_queue() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    for i in range(100):
        scheduler.add(make_request(f"r{i}"))
    for i in range(99):
        scheduler.abort(f"r{i}")
        assert len(scheduler.waiting) == 99 - i
    assert len(scheduler.waiting._heap) < 4  # and their memory with them
    assert finish_all(scheduler) == ["r99"]


# Preemption


def test_the_latest_gives_way_and_is_computed_again() -> None:
    scheduler = make_scheduler(num_blocks=5, enable_prefix_caching=False)
    a, b = make_request("a", 15, 20), make_request("b", 16, 20)
    scheduler.add(a)
    scheduler.add(b)
    step(scheduler)  # two blocks each
    assert step(scheduler) == [("a", 15, 1), ("b", 16, 1)]  # b takes the fifth
    batch = scheduler.schedule(0.0)  # a needs one
    assert shape(batch) == [("a", 16, 1)]
    assert batch.num_preemptions == 1
    assert b.state is RequestState.WAITING
    assert (b.num_computed_tokens, b.num_preemptions, b.tables.groups) == (0, 1, [[]])
    scheduler.update(batch, answer(batch))
    assert finish_all(scheduler) == ["a", "b"]
    assert b.num_output_tokens == 20


def test_recomputing_finds_what_prefix_caching_kept() -> None:
    scheduler = make_scheduler(num_blocks=8)
    request = make_request("a", 30, 20)
    scheduler.add(request)
    step(scheduler)
    scheduler.preempt_all()
    scheduler.check_integrity()
    assert step(scheduler) == [("a", 24, 7)]
    assert request.num_cached_tokens == 0  # counts what was spared at first admission


def test_a_preempted_sequence_that_outgrew_a_step_is_chunked_even_if_chunking_is_off() -> None:
    scheduler = make_scheduler(
        max_num_batched_tokens=16,
        max_num_seqs=2,
        enable_chunked_prefill=False,
        enable_prefix_caching=False,
    )
    scheduler.add(make_request("a", 16, 30))
    for _ in range(10):
        step(scheduler)
    scheduler.preempt_all()
    assert step(scheduler) == [("a", 0, 16)]
    assert step(scheduler) == [("a", 16, 10)]
    assert finish_all(scheduler) == ["a"]


def test_the_watermark_keeps_blocks_for_those_that_run() -> None:
    scheduler = make_scheduler(num_blocks=10, watermark=0.3)
    scheduler.add(make_request("a", 40, 20))
    scheduler.add(make_request("b", 24, 20))
    assert step(scheduler) == [("a", 0, 40)]  # b would leave 2 of 10 blocks, below 3
    assert len(scheduler.waiting) == 1
    assert finish_all(scheduler) == ["a", "b"]


def test_the_watermark_never_keeps_a_request_from_an_empty_engine() -> None:
    scheduler = make_scheduler(num_blocks=10, watermark=0.5)
    assert scheduler.add(make_request("a", 70, 11))
    assert finish_all(scheduler) == ["a"]


def test_lowering_the_seats_preempts_the_rest() -> None:
    scheduler = make_scheduler(max_num_seqs=8)
    for name in "abcdef":
        scheduler.add(make_request(name))
    step(scheduler)
    scheduler.config = scheduler.config.replace(max_num_seqs=2)
    batch = scheduler.schedule(0.0)
    assert [s.request.request_id for s in batch.sequences] == ["a", "b"]
    assert batch.num_preemptions == 4
    scheduler.update(batch, answer(batch))
    assert finish_all(scheduler) == list("abcdef")


def test_equal_requests_make_equal_schedules() -> None:
    def schedules() -> list[list[tuple[str, int, int]]]:
        scheduler = make_scheduler(num_blocks=12, max_num_batched_tokens=32, max_num_seqs=6)
        for i in range(12):
            scheduler.add(make_request(f"r{i}", 5 + 7 * i % 40, 3 + 5 * i % 11))
        steps = []
        while scheduler.num_unfinished:
            steps.append(step(scheduler))
        return steps

    assert schedules() == schedules()


def test_the_prefix_of_a_blocked_request_is_looked_up_once() -> None:
    scheduler = make_scheduler(num_blocks=10)
    lookups = 0
    match_prefix = scheduler.pool.match_prefix

    def counted(tables: BlockTables, token_ids: list[int]) -> Prefix:
        nonlocal lookups
        lookups += 1
        return match_prefix(tables, token_ids)

    scheduler.pool.match_prefix = counted  # type: ignore[method-assign]
    scheduler.add(make_request("a", 56, 17))
    scheduler.add(make_request("b", 56, 17))
    for _ in range(16):
        step(scheduler)
    assert lookups <= 4  # one a lookup for `a`, and one for `b` per change of what is available
    assert finish_all(scheduler) == ["a", "b"]


def test_a_blocked_request_is_admitted_as_soon_as_enough_blocks_are_free() -> None:
    scheduler = make_scheduler(num_blocks=10, enable_prefix_caching=False)
    for name, prompt, tokens in (("short", 24, 3), ("long", 24, 30), ("waits", 40, 2)):
        scheduler.add(make_request(name, prompt, tokens))
    for _ in range(3):
        assert "waits" not in {name for name, _, _ in step(scheduler)}
    assert step(scheduler) == [("long", 26, 1), ("waits", 0, 40)]
