"""What drafted tokens may take from a step, and what is given back of it."""

from __future__ import annotations

from engine.batch import Batch, BatchResult
from engine.request import Request
from engine.scheduler import Scheduler
from engine.speculate.draft import Draft
from tests.engine.scheduling import make_request, make_scheduler, step


def decoding(scheduler: Scheduler, *names: str, prompt: int = 7, max_tokens: int = 40) -> None:
    """Requests whose prompts are computed, with one token each."""
    for name in names:
        assert scheduler.add(make_request(name, prompt, max_tokens))
    step(scheduler)


def running(scheduler: Scheduler) -> dict[str, Request]:
    return {request.request_id: request for request in scheduler.running}


def drafted(batch: Batch) -> dict[str, int]:
    return {s.request.request_id: s.num_drafted for s in batch.sequences[: batch.num_decodes]}


def test_those_without_drafts_stand_first() -> None:
    scheduler = make_scheduler()
    decoding(scheduler, "a", "b", "c")
    running(scheduler)["a"].draft = Draft([3, 3])
    running(scheduler)["c"].draft = Draft([3])
    batch = scheduler.schedule(0.0)
    assert [(s.request.request_id, s.num_tokens) for s in batch.sequences] == [
        ("b", 1),
        ("a", 3),
        ("c", 2),
    ]
    assert (batch.num_tokens, batch.num_drafted_tokens, batch.num_prefill_tokens) == (6, 3, 0)


def test_prompts_come_before_drafts() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=16, max_num_seqs=4)
    decoding(scheduler, "a", "b")
    for request in scheduler.running:
        request.draft = Draft([3] * 8)
    assert scheduler.add(make_request("new", 12))
    batch = scheduler.schedule(0.0)
    assert batch.num_prefill_tokens == 12
    assert drafted(batch) == {"a": 2, "b": 0}
    assert batch.num_tokens == 16


def test_nobody_is_preempted_for_a_draft() -> None:
    scheduler = make_scheduler(num_blocks=3)
    decoding(scheduler, "a", "b", prompt=6, max_tokens=12)
    for request in scheduler.running:
        request.draft = Draft([3] * 4)
    batch = scheduler.schedule(0.0)
    scheduler.check_integrity()
    # Seven tokens each, in blocks of eight: one has another block for it, the other the rest of its
    # own.
    assert drafted(batch) == {"a": 4, "b": 1}
    assert batch.num_preemptions == 0


def test_no_more_is_verified_than_can_be_accepted() -> None:
    scheduler = make_scheduler()
    decoding(scheduler, "chain", "tree", "last", max_tokens=4)
    requests = running(scheduler)
    requests["chain"].draft = Draft([3] * 8)
    requests["tree"].draft = Draft([1, 2, 3, 4], [-1, -1, -1, -1])
    requests["last"].token_ids += [3, 3]
    requests["last"].num_computed_tokens += 2
    requests["last"].draft = Draft([3])
    # The chain's fourth token would be the request's fifth.
    assert drafted(scheduler.schedule(0.0)) == {"last": 0, "chain": 2, "tree": 4}


def test_what_was_rejected_is_given_back() -> None:
    scheduler = make_scheduler(num_blocks=8)
    decoding(scheduler, "a", prompt=7)  # and a token: a block is full
    (request,) = scheduler.running
    request.draft = Draft([5] * 20)
    batch = scheduler.schedule(0.0)
    assert scheduler.pool.num_used == 4
    scheduler.update(batch, BatchResult([[5, 5, 9]], 0.01))
    scheduler.check_integrity()
    assert request.num_computed_tokens == 10
    assert request.token_ids[8:] == [5, 5, 9]
    assert scheduler.pool.num_used == 2
    assert request.draft is None


def test_a_draft_ends_with_the_request() -> None:
    scheduler = make_scheduler()
    decoding(scheduler, "a", max_tokens=9)
    (request,) = scheduler.running
    request.draft = Draft([3, 40, 3, 3])  # 40 ends a sequence
    batch = scheduler.schedule(0.0)
    assert scheduler.update(batch, BatchResult([[3, 40, 3, 3, 3]], 0.01)) == [request]
    assert request.output_token_ids == [3, 3, 40]
    assert scheduler.pool.num_used == 0
