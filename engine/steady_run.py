"""Runs of steps in which nothing but the lengths changes, taken at once.

A simulator spends most of its steps on decodes: the same requests, a token each, step after step.
What the scheduler would do in them is known beforehand, so they need not be played one by one. Once
those that are complete are finished, the state is the one that as many calls of `schedule` and
`update` would leave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from engine.batch import Batch
from engine.blocks import BlockPool
from engine.request import Request
from engine.scheduler import Scheduler

# Tokens from `first` on of what a request generates: (request, first, count).
Tokens = Callable[[Request, int, int], Sequence[int]]


def steady_steps(scheduler: Scheduler, previous: Batch) -> int:
    """How many of the next steps decode just the running requests, given the batch before them.

    The last of them may finish requests; arrivals end the run earlier. 0 where that cannot be told:
    the next step is then to be scheduled. Counted without stop tokens: requests run to their
    length.
    """
    running, pool = scheduler.running, scheduler.pool
    if not running or not pool.uniform:
        return 0
    if scheduler.waiting:
        # Whoever waits did not get in last time. Unless something else was computed then, they
        # will not now: the same seats and tokens are left, and no more blocks.
        same = previous.num_decodes == len(previous.sequences) == len(running)
        if not same or scheduler.config.scheduling_policy == "priority":
            return 0
    elif len(running) > scheduler.config.max_num_seqs:
        return 0
    if len(running) > scheduler.config.max_num_batched_tokens:
        return 0
    steps = 1 << 30
    for request in running:
        length = len(request.token_ids)
        if length - request.num_computed_tokens != 1:
            return 0
        left = request.max_total_tokens - length
        if left < steps:
            steps = left
    available = pool.num_available
    if len(running) * (-(-steps // pool.block_size) + 1) > available:
        # Preemptions are the scheduler's.
        while steps and _needed_blocks(pool, running, steps) > available:
            steps //= 2
    return steps


def advance(
    scheduler: Scheduler, steps: int, tokens: Tokens, *, in_order: bool = False
) -> list[Request]:
    """Take `steps` steps, at most `steady_steps`; returns the requests that the last completed.

    These are yet to be finished with `Scheduler.finish`, in this order: until then the blocks in
    use are those of the last step.

    Args:
        scheduler: where all running requests decode.
        steps: how many.
        tokens: what requests generate.
        in_order: whether what requests generate may be equal to what others have, so that it
            matters whose block is found first; slower.
    """
    pool, size = scheduler.pool, scheduler.pool.block_size
    running = scheduler.running
    if in_order and pool.enable_prefix_caching:
        _advance_in_order(scheduler, steps, tokens)
    else:
        registers = pool.enable_prefix_caching
        for request in running:
            computed = request.num_computed_tokens
            last = computed + steps  # tokens that the last step computes up to
            if last > request.tables.capacity:
                pool.extend(request.tables, last)
            request.token_ids += tokens(request, computed + 1 - request.num_prompt_tokens, steps)
            if registers and last // size != computed // size:
                tables = request.tables
                prompt = request.num_prompt_tokens // size
                if len(tables.digests) < prompt:
                    tables.digest(request.token_ids, size, prompt - 1)
                tables.name_as_unlike_any(last // size - 1, request.rank[1])
                pool.register(tables, request.token_ids, last)
            request.num_computed_tokens = last
    return [r for r in running if r.num_computed_tokens + 1 >= r.max_total_tokens]


def _advance_in_order(scheduler: Scheduler, steps: int, tokens: Tokens) -> None:
    """Blocks are taken and made findable in the order in which single steps would do it."""
    pool, size = scheduler.pool, scheduler.pool.block_size
    events: list[tuple[int, int, int]] = []  # step, taking before registering, place
    running = scheduler.running
    for place, request in enumerate(running):
        length = len(request.token_ids)
        grows = max(0, request.tables.capacity - length + 1)
        events += [(step, 0, place) for step in range(grows, steps, size)]
        fills = -length % size
        events += [(step, 1, place) for step in range(fills, steps, size)]
        request.token_ids.extend(tokens(request, length - request.num_prompt_tokens, steps))
    events.sort()
    for step, registers, place in events:
        request = running[place]
        end = len(request.token_ids) - steps + step
        if registers:
            pool.register(request.tables, request.token_ids, end)
        else:
            pool.extend(request.tables, end)
    for request in running:
        request.num_computed_tokens = len(request.token_ids) - 1


def _needed_blocks(pool: BlockPool, running: Sequence[Request], steps: int) -> int:
    size = pool.block_size
    needed = 0
    for request in running:
        over = len(request.token_ids) + steps - 1 - request.tables.capacity
        if over > 0:
            needed += -(-over // size)
    return needed
