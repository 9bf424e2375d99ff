import subprocess
import sys

import pytest

from engine.batch import Batch, BatchResult
from engine.blocks import BlockPool
from engine.config import EngineConfig
from engine.request import FinishReason, Request, RequestState, SamplingParams
from engine.scheduler import Scheduler
from engine.waiting_queue import SJF_AGING_TOKENS

EOS = 40
STEP = 0.01


def make_scheduler(num_blocks: int = 64, max_model_len: int = 256, **knobs: object) -> Scheduler:
    config = EngineConfig.from_mapping({"block_size": 8, **knobs})
    pool = BlockPool(num_blocks, 8, config.enable_prefix_caching)
    return Scheduler(config, pool, max_model_len, frozenset({EOS}), vocab_size=50)


def make_request(
    name: str,
    prompt: int | list[int] = 8,
    max_tokens: int | None = 4,
    *,
    arrival: float = 0.0,
    priority: int = 0,
    **sampling: object,
) -> Request:
    # Prompts given by length differ from their first token on, so that none shares a prefix.
    tokens = [hash_of(name), *([1] * (prompt - 1))] if isinstance(prompt, int) else [*prompt]
    params = SamplingParams(max_tokens=max_tokens, **sampling)  # type: ignore[arg-type]
    return Request(name, tokens, params, arrival, priority)


def hash_of(name: str) -> int:
    return sum(map(ord, name)) % 50


def answer(batch: Batch, token: int = 3) -> BatchResult:
    return BatchResult([[token] if s.samples else [] for s in batch.sequences], STEP)


def shape(batch: Batch) -> list[tuple[str, int, int]]:
    return [(s.request.request_id, s.start, s.num_tokens) for s in batch.sequences]


def step(scheduler: Scheduler, now: float = 0.0, token: int = 3) -> list[tuple[str, int, int]]:
    batch = scheduler.schedule(now)
    scheduler.check_integrity()
    assert all(s.num_tokens == 1 and s.samples for s in batch.sequences[: batch.num_decodes])
    scheduler.update(batch, answer(batch, token))
    scheduler.check_integrity()
    return shape(batch)


def finish_all(scheduler: Scheduler, limit: int = 1000) -> list[str]:
    """Step to the end; the ids in the order in which they finished."""
    order: list[str] = []
    for _ in range(limit):
        batch = scheduler.schedule(0.0)
        scheduler.check_integrity()
        if not batch.sequences:
            assert scheduler.num_unfinished == 0
            assert scheduler.pool.num_used == 0
            return order
        order += [r.request_id for r in scheduler.update(batch, answer(batch))]
    raise AssertionError("the scheduler did not come to an end")


def test_the_scheduler_imports_no_torch() -> None:
    code = (
        "import sys, engine.scheduler, engine.engine; "
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Admission


@pytest.mark.parametrize(
    ("request_", "knobs", "reason"),
    [
        (make_request("a", []), {}, "prompt is empty"),
        (make_request("a", [1, 50, 2]), {}, "token id 50; ids must be from 0 to 49"),
        (make_request("a", [1, -1, 2]), {}, "token id -1"),
        (make_request("a", 256), {}, "prompt of 256 tokens .* max_model_len=256; at most 255"),
        (make_request("a", 20, 64), {"num_blocks": 10}, "holds 80 tokens, .* may need 83"),
        (make_request("a", 90, None), {"num_blocks": 10}, "holds 80 tokens, .* may need 90"),
        (
            make_request("a", 65),
            {"max_num_batched_tokens": 64, "max_num_seqs": 8, "enable_chunked_prefill": False},
            "max_num_batched_tokens=64 and enable_chunked_prefill is off",
        ),
    ],
)
def test_what_can_never_be_served_is_refused_with_the_reason(
    request_: Request, knobs: dict[str, int], reason: str
) -> None:
    scheduler = make_scheduler(**knobs)  # type: ignore[arg-type]
    assert not scheduler.add(request_)
    assert request_.state is RequestState.FINISHED
    assert request_.finish_reason is FinishReason.REFUSED
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(request_.refusal)
    assert scheduler.num_unfinished == 0
    assert scheduler.next_wakeup(0.0) is None


def test_the_largest_request_that_fits_alone_is_served() -> None:
    # 10 blocks hold 80 tokens; the last token of 81 is never computed.
    scheduler = make_scheduler(num_blocks=10)
    request = make_request("a", 20, 61)
    assert scheduler.add(request)
    assert finish_all(scheduler) == ["a"]
    assert request.num_output_tokens == 61
    assert not scheduler.add(make_request("b", 20, 62))


def test_without_max_tokens_output_ends_at_the_model_or_the_cache() -> None:
    for num_blocks, total in ((64, 256), (10, 81)):
        scheduler = make_scheduler(num_blocks=num_blocks)
        request = make_request("a", 20, None)
        assert scheduler.add(request)
        finish_all(scheduler)
        assert len(request.token_ids) == total
        assert request.finish_reason is FinishReason.LENGTH


def test_max_tokens_beyond_the_model_is_clipped() -> None:
    scheduler = make_scheduler(max_model_len=30)
    request = make_request("a", 20, 64)
    assert scheduler.add(request)
    finish_all(scheduler)
    assert len(request.token_ids) == 30


def test_a_full_queue_refuses_until_it_has_room() -> None:
    scheduler = make_scheduler(max_num_queued_reqs=2, max_num_seqs=1)
    assert scheduler.add(make_request("a"))
    assert scheduler.add(make_request("b"))
    refused = make_request("c")
    assert not scheduler.add(refused)
    assert refused.refusal is not None
    assert "max_num_queued_reqs=2" in refused.refusal
    step(scheduler)  # takes one from the queue
    assert scheduler.add(make_request("d"))
    assert finish_all(scheduler) == ["a", "b", "d"]


def test_an_id_in_use_is_refused_and_its_owner_unharmed() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a"))
    second = make_request("a")
    assert not scheduler.add(second)
    assert second.refusal is not None
    assert "'a' is in use" in second.refusal
    assert finish_all(scheduler) == ["a"]
    assert scheduler.add(make_request("a"))


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
    assert (first.num_decodes, first.num_tokens, first.num_kv_tokens) == (0, 16, 16)
    scheduler.update(first, answer(first))
    second = scheduler.schedule(0.0)
    assert [s.samples for s in second.sequences] == [True]
    assert (second.num_tokens, second.num_kv_tokens) == (4, 20)


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
    assert len(batch.sequences[0].request.block_table) == 2


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
    assert (b.num_computed_tokens, b.num_preemptions, b.block_table) == (0, 1, [])
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


# Policies


def test_priority_serves_the_lower_number_first_then_arrival() -> None:
    scheduler = make_scheduler(max_num_seqs=1, scheduling_policy="priority")
    for name, priority in (("a", 2), ("b", 1), ("c", 1), ("d", 0)):
        scheduler.add(make_request(name, priority=priority))
    assert finish_all(scheduler) == ["d", "b", "c", "a"]


def test_priority_preempts_the_least_for_a_more_urgent_request() -> None:
    scheduler = make_scheduler(num_blocks=8, max_num_seqs=2, scheduling_policy="priority")
    scheduler.add(make_request("low", 16, 20, priority=5))
    scheduler.add(make_request("mid", 16, 20, priority=3))
    step(scheduler)
    scheduler.add(make_request("high", 16, 20, priority=1))
    batch = scheduler.schedule(0.0)
    assert [s.request.request_id for s in batch.sequences] == ["mid", "high"]
    assert batch.num_preemptions == 1
    scheduler.update(batch, answer(batch))
    assert finish_all(scheduler) == ["high", "mid", "low"]


def test_priority_does_not_preempt_equals_nor_in_vain() -> None:
    scheduler = make_scheduler(num_blocks=8, max_num_seqs=2, scheduling_policy="priority")
    scheduler.add(make_request("first", 40, 10, priority=1))
    scheduler.add(make_request("low", 8, 10, priority=5))
    step(scheduler)
    scheduler.add(make_request("equal", 8, 4, priority=5))
    # More urgent than `low`, but even without it `first` leaves too few blocks.
    scheduler.add(make_request("large", 24, 10, priority=2))
    batch = scheduler.schedule(0.0)
    assert batch.num_preemptions == 0
    assert [s.request.request_id for s in batch.sequences] == ["first", "low"]


def test_sjf_serves_the_least_work_first() -> None:
    scheduler = make_scheduler(max_num_seqs=1, scheduling_policy="sjf")
    scheduler.add(make_request("long", 200, 40))
    scheduler.add(make_request("middle", 20, 100))
    scheduler.add(make_request("short", 20, 4))
    assert finish_all(scheduler) == ["short", "middle", "long"]


def test_sjf_starves_nobody() -> None:
    scheduler = make_scheduler(max_num_seqs=1, scheduling_policy="sjf")
    long = make_request("long", 200, 40)
    scheduler.add(long)
    overtook: list[str] = []
    for i in range(200):
        # Short ones keep coming, faster than they are served.
        scheduler.add(make_request(f"short{i}", 4, 1))
        scheduler.add(make_request(f"other{i}", 4, 1))
        overtook += [name for name, _, _ in step(scheduler)]
        if long.state is RequestState.RUNNING:
            break
    overtook.remove("long")
    assert 1 < len(overtook) <= 240 // SJF_AGING_TOKENS


def test_changing_the_policy_reorders_the_queue() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add(make_request("long", 100, 9, priority=1))
    scheduler.add(make_request("short", 10, 9, priority=2))
    scheduler.config = scheduler.config.replace(scheduling_policy="sjf")
    assert scheduler.waiting.peek() is scheduler._requests["short"]
    scheduler.config = scheduler.config.replace(scheduling_policy="priority")
    assert scheduler.waiting.peek() is scheduler._requests["long"]
    scheduler.check_integrity()
    assert finish_all(scheduler) == ["long", "short"]


@pytest.mark.parametrize("policy", ["fcfs", "sjf"])
def test_a_large_request_at_the_head_is_not_starved_by_small_ones(policy: str) -> None:
    scheduler = make_scheduler(num_blocks=16, scheduling_policy=policy, max_num_seqs=8)
    for i in range(6):
        scheduler.add(make_request(f"first{i}", 8, 9))
    step(scheduler)
    scheduler.add(make_request("large", 100, 20))
    for i in range(400):
        scheduler.add(make_request(f"later{i}", 8, 9))
        step(scheduler)
        if any(r.request_id == "large" for r in scheduler.running):
            return
    raise AssertionError("small requests kept the large one out")


# Batching modes


def test_static_batching_admits_nobody_until_the_batch_is_done() -> None:
    scheduler = make_scheduler(max_num_seqs=2, batching_mode="static")
    for name, tokens in (("a", 2), ("b", 5), ("c", 2)):
        scheduler.add(make_request(name, 8, tokens))
    for _ in range(5):
        names = {name for name, _, _ in step(scheduler)}
        assert "c" not in names
    assert step(scheduler) == [("c", 0, 8)]


def test_a_static_batch_is_whole_even_if_its_prompts_take_several_steps() -> None:
    scheduler = make_scheduler(max_num_seqs=3, batching_mode="static", max_num_batched_tokens=10)
    for name in "abcd":
        scheduler.add(make_request(name, 8))
    assert step(scheduler) == [("a", 0, 8), ("b", 0, 2)]
    assert len(scheduler.running) == 3
    assert step(scheduler) == [("a", 8, 1), ("b", 2, 6), ("c", 0, 3)]
    assert finish_all(scheduler) == list("abcd")


def test_dynamic_batching_waits_for_a_full_batch_or_its_delay() -> None:
    scheduler = make_scheduler(max_num_seqs=3, batching_mode="dynamic", max_queue_delay=0.5)
    scheduler.add(make_request("a", arrival=1.1))
    scheduler.add(make_request("b", arrival=1.2))
    assert step(scheduler, 1.3) == []
    wakeup = scheduler.next_wakeup(1.3)
    assert wakeup == 1.1 + 0.5
    # At exactly that time it runs: a virtual clock that jumps there must not spin.
    assert [name for name, _, _ in step(scheduler, wakeup)] == ["a", "b"]
    assert scheduler.next_wakeup(wakeup) == wakeup


def test_dynamic_batching_starts_at_once_when_the_batch_is_full() -> None:
    scheduler = make_scheduler(max_num_seqs=2, batching_mode="dynamic", max_queue_delay=60.0)
    scheduler.add(make_request("a"))
    assert step(scheduler, 0.0) == []
    scheduler.add(make_request("b"))
    assert scheduler.next_wakeup(0.0) == 0.0
    assert [name for name, _, _ in step(scheduler, 0.0)] == ["a", "b"]


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

    def counted(token_ids: list[int]) -> list[int]:
        nonlocal lookups
        lookups += 1
        return match_prefix(token_ids)

    scheduler.pool.match_prefix = counted  # type: ignore[method-assign]
    scheduler.add(make_request("a", 56, 17))
    scheduler.add(make_request("b", 56, 17))
    for _ in range(16):
        step(scheduler)
    assert lookups <= 4  # one a lookup for `a`, and one for `b` per change of what is available
    assert finish_all(scheduler) == ["a", "b"]
