"""Who gives way where a waiting request has a higher priority than running ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from engine.blocks import BlockPool
from engine.request import Request


def give_way(
    head: Request | None,
    running: Sequence[Request],
    pool: BlockPool,
    max_num_seqs: int,
    reserve: int,
    preempt_last: Callable[[], Request],
) -> int:
    """Preempt running requests for a waiting one of strictly higher priority.

    Nobody is preempted where that would not make it fit.

    Args:
        head: the first that waits; None if nobody does.
        running: those that run, in the order of their ranks.
        pool: the blocks that they share.
        max_num_seqs: most requests that run.
        reserve: blocks to leave free at an admission while others run.
        preempt_last: takes the last of `running` out of it and gives up its blocks.

    Returns:
        How many were preempted.
    """
    if head is None or not running or head.priority >= running[-1].priority:
        return 0
    prefix = pool.match_prefix(head.tables, head.token_ids)
    num_tokens = len(head.token_ids)
    lower = [r for r in running if r.priority > head.priority]
    # Those that run take the blocks that they need in this step before anyone is admitted.
    growth = sum(_growth(pool, r) for r in running)
    within_reach = pool.num_available + sum(r.tables.num_owned + _growth(pool, r) for r in lower)
    kept = reserve if len(lower) < len(running) else 0
    if within_reach < pool.missing(prefix, num_tokens) + kept + growth:
        return 0
    count = 0
    while running and running[-1].priority > head.priority:
        if len(running) < max_num_seqs and pool.can_allocate(prefix, num_tokens, reserve + growth):
            break
        growth -= _growth(pool, running[-1])
        preempt_last()
        count += 1
    return count


def _growth(pool: BlockPool, request: Request) -> int:
    """Blocks that a running request needs in the next step beyond those that it has."""
    least = request.num_computed_tokens + 1
    return pool.growth(request.tables, len(request.token_ids), least)
