"""Whether a request can ever be served; if not, why, in one sentence."""

from __future__ import annotations

from engine.blocks import BlockPool
from engine.config import EngineConfig
from engine.request import Request


def refusal_at_entry(
    request: Request,
    config: EngineConfig,
    pool: BlockPool,
    max_model_len: int,
    vocab_size: int | None,
    num_waiting: int,
) -> str | None:
    """Why a new request is refused, or None; sets `request.max_total_tokens`.

    `num_waiting` is the length of the queue before it; `vocab_size` None means that token ids are
    not checked against a vocabulary.
    """
    tokens = request.token_ids
    if not tokens:
        return "the prompt is empty; give at least one token"
    if min(tokens) < 0 or (vocab_size is not None and max(tokens) >= vocab_size):
        wrong = next(t for t in tokens if t < 0 or (vocab_size is not None and t >= vocab_size))
        allowed = "at least 0" if vocab_size is None else f"from 0 to {vocab_size - 1}"
        return f"the prompt holds token id {wrong}; ids must be {allowed}"
    reason = refusal_for_size(request, pool, max_model_len)
    if reason is not None:
        return reason
    limit = config.max_num_batched_tokens
    if not config.enable_chunked_prefill and len(tokens) > limit:
        return (
            f"the prompt of {len(tokens)} tokens is longer than max_num_batched_tokens={limit} "
            "and enable_chunked_prefill is off; shorten it, raise the limit or allow chunks"
        )
    most = config.max_num_queued_reqs
    if most is not None and num_waiting >= most:
        return f"{num_waiting} requests wait already (max_num_queued_reqs={most}); try again later"
    return None


def refusal_for_size(request: Request, pool: BlockPool, max_model_len: int) -> str | None:
    """Why the request can never fit the model's length or the KV cache, or None.

    Sets `request.max_total_tokens`: prompt and output together, at most `max_model_len`. Without
    `max_tokens` the output may also grow only as far as the KV cache reaches.

    The token generated last is never computed, so n tokens need the KV cache of n - 1.
    """
    tokens = len(request.token_ids)
    if tokens >= max_model_len:
        what = "prompt" if not request.num_output_tokens else "sequence"
        return (
            f"the {what} of {tokens} tokens leaves no room for output within "
            f"max_model_len={max_model_len}; at most {max_model_len - 1} fit"
        )
    room = pool.longest(max_model_len)
    wanted = request.sampling.max_tokens
    if wanted is None:
        total = min(max_model_len, room + 1)
    else:
        total = min(max_model_len, request.num_prompt_tokens + wanted)
    if max(tokens, total - 1) > room:
        return (
            f"the KV cache holds {room} tokens, and the request may need "
            f"{max(tokens, total - 1)}: {request.num_prompt_tokens} of prompt and the rest of "
            "output; lower max_tokens, shorten the prompt or raise kv_cache_memory_bytes"
        )
    request.max_total_tokens = total
    return None
