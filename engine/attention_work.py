"""How much a step's attention reads and computes, for its record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from engine.batch import Batch
from engine.block_groups import BlockGroup, mean_visible_tokens


class AttentionWork(NamedTuple):
    """Cached tokens that a step reads, and pairs of query and key that its prompt chunks compute.

    `prefill_kv_tokens` is the part of `kv_tokens` that the prompt chunks read. All are means over
    the layers where these see different windows.
    """

    kv_tokens: int = 0
    prefill_kv_tokens: int = 0
    prefill_pairs: int = 0


def attention_work(batch: Batch, groups: Sequence[BlockGroup], *, uniform: bool) -> AttentionWork:
    """Count a batch; `uniform` says that every layer sees all, which is cheaper to count."""
    decodes = batch.sequences[: batch.num_decodes]
    chunks = batch.sequences[batch.num_decodes :]
    pairs = sum([_pairs(s.start, s.num_tokens) for s in chunks])
    if uniform:
        read = sum([s.end for s in chunks])
        return AttentionWork(sum([s.end for s in decodes]) + read, read, pairs)
    seen = sum(mean_visible_tokens(groups, s.end, s.num_tokens) for s in chunks)
    layers = sum(len(group.layers) for group in groups)
    pairs = round(
        sum(
            len(group.layers) * _windowed_pairs(s.start, s.num_tokens, group.window)
            for group in groups
            for s in chunks
        )
        / layers
    )
    whole = seen + sum(mean_visible_tokens(groups, s.end, s.num_tokens) for s in decodes)
    return AttentionWork(round(whole), round(seen), pairs)


def _pairs(start: int, num_tokens: int) -> int:
    """Pairs under the causal mask: the token at position p sees p + 1 keys."""
    return num_tokens * start + num_tokens * (num_tokens + 1) // 2


def _windowed_pairs(start: int, num_tokens: int, window: int) -> int:
    """The same where a token sees at most `window` keys, itself included; 0 sees all."""
    if not window:
        return _pairs(start, num_tokens)
    # Tokens before position `window - 1` still see all that came before them.
    growing = max(0, min(num_tokens, window - start))
    return _pairs(start, growing) + (num_tokens - growing) * window
