"""The hidden states that a model makes of whole token sequences, for heads to learn from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from engine.kv_cache import KVCache
from engine.models.decoder import Decoder
from kernels.metadata import build_attention_metadata

_BLOCK_SIZE = 16
# Tokens that go through the model at once: enough to keep the matmuls busy.
_TOKENS_AT_ONCE = 4096


def hidden_states(decoder: Decoder, sequences: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """States after the final norm of each sequence by itself, [its tokens, hidden].

    They are in the model's dtype, in memory of their own. Sequences have at least 2 tokens. The
    model is not divided, and has rotary tables for the longest of them.
    """
    batches: list[list[Sequence[int]]] = [[]]
    for sequence in sequences:
        if batches[-1] and sum(map(len, batches[-1])) + len(sequence) > _TOKENS_AT_ONCE:
            batches.append([])
        batches[-1].append(sequence)
    if not batches[0]:
        return
    most = max(sum(_num_blocks(sequence) for sequence in batch) for batch in batches)
    cache = KVCache.allocate(decoder.spec, most, _BLOCK_SIZE, decoder.dtype, decoder.device)
    for batch in batches:
        yield from _batch_states(decoder, cache, batch)


def _batch_states(
    decoder: Decoder, cache: KVCache, batch: Sequence[Sequence[int]]
) -> Iterator[Tensor]:
    lengths, device = [len(sequence) for sequence in batch], decoder.device
    tables, used = [], 0
    for sequence in batch:
        tables.append(list(range(used, used + _num_blocks(sequence))))
        used = tables[-1][-1] + 1
    metadata = build_attention_metadata(tables, lengths, lengths, _BLOCK_SIZE, device)
    token_ids = torch.tensor([token for sequence in batch for token in sequence], device=device)
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    with torch.inference_mode():
        caches = cache.layers
        states = decoder.forward(token_ids, positions, caches, [metadata] * len(caches))
    # Copied outside of inference mode, so that heads can be trained on them.
    yield from (part.clone() for part in torch.split(states, lengths))


def _num_blocks(sequence: Sequence[int]) -> int:
    return -(-len(sequence) // _BLOCK_SIZE)
