import pytest

from engine.request import RequestState
from engine.waiting_queue import SJF_AGING_TOKENS
from tests.engine.scheduling import answer, finish_all, make_request, make_scheduler, step

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


def test_changing_the_policy_changes_who_gives_way() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("lax", priority=2))
    scheduler.add(make_request("urgent", priority=1))
    step(scheduler)
    scheduler.config = scheduler.config.replace(scheduling_policy="priority")
    scheduler.check_integrity()
    scheduler.config = scheduler.config.replace(max_num_seqs=1)
    assert [name for name, _, _ in step(scheduler)] == ["urgent"]


def test_lowering_the_watermark_lets_a_blocked_request_in() -> None:
    scheduler = make_scheduler(num_blocks=10, watermark=0.3)
    scheduler.add(make_request("runs", 34, 20))
    scheduler.add(make_request("waits", 24, 20))
    assert step(scheduler) == [("runs", 0, 34)]
    scheduler.config = scheduler.config.replace(watermark=0.0)
    assert step(scheduler) == [("runs", 34, 1), ("waits", 0, 24)]
