"""What drafted tokens mean for a step: which are verified, and what stays of them."""

from __future__ import annotations

from engine.batch import ScheduledSequence
from engine.blocks import BlockPool
from engine.config import EngineConfig
from engine.request import Request
from engine.speculate.draft import Draft


def add_drafts(
    sequences: list[ScheduledSequence],
    num_decodes: int,
    config: EngineConfig,
    pool: BlockPool,
    max_model_len: int,
    reserve: int,
) -> None:
    """Let a step's decodes verify what was drafted, with the tokens and blocks that are left.

    So no prompt is delayed and nobody preempted for a guess; `reserve` blocks stay available. The
    first `num_decodes` of the step's `sequences` decode; those without drafted tokens come to stand
    first.
    """
    chunks = sequences[num_decodes:]
    taken = num_decodes + sum([s.num_tokens for s in chunks])
    budget = config.max_num_batched_tokens - taken
    plain: list[ScheduledSequence] = []
    verified: list[ScheduledSequence] = []
    for sequence in sequences[:num_decodes]:
        request = sequence.request
        draft = request.draft
        if draft is not None:
            most = min(budget, _most_useful(request, draft, max_model_len))
            count = _make_room(request, min(len(draft), most), pool, reserve)
            if count:
                sequence.draft = draft.first(count)
                sequence.num_tokens += count
                budget -= count
                verified.append(sequence)
                continue
        plain.append(sequence)
    sequences[:] = plain + verified + chunks


def keep_accepted(request: Request, pool: BlockPool, start: int, end: int) -> None:
    """Count a decode's tokens from `start` to `end` as computed; give the others' blocks back.

    Those are the one that it began with and the drafted ones that were accepted; the one that was
    chosen after them stands at `end`.
    """
    tables, token_ids = request.tables, request.token_ids
    pool.shrink(tables, len(token_ids))
    if end // pool.block_size != start // pool.block_size:
        pool.register(tables, token_ids, end)
    request.num_computed_tokens = end
    if not pool.uniform:
        pool.give_up_before(tables, end)


def _most_useful(request: Request, draft: Draft, max_model_len: int) -> int:
    """Drafted tokens beyond which none can be accepted, or has a place in the cache."""
    num_tokens = len(request.token_ids)
    # The model's own choice comes behind them, so a chain that ends the request loses its last.
    longest = request.max_total_tokens - num_tokens - 1
    if longest > 0 and draft.parents is not None:
        return max_model_len - num_tokens
    return longest


def _make_room(request: Request, wanted: int, pool: BlockPool, reserve: int) -> int:
    """Give a request the blocks for drafted tokens; for how many of those `wanted` it has them."""
    if wanted <= 0:
        return 0
    tables, num_tokens = request.tables, len(request.token_ids)
    total = num_tokens + wanted
    if total > tables.capacity:
        growth = pool.growth(tables, total, total)
        if growth + reserve <= pool.num_available:
            pool.extend(tables, total)
    return max(0, min(wanted, tables.capacity - num_tokens))
