"""The layout of one engine step, as attention and the KV cache see it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class AttentionMetadata:
    """One step's layout.

    Sequences are ordered: all with at most `decode_query_len` new tokens ("decodes") first, then
    prefill chunks. That length is 1 except where drafted tokens are verified.

    A captured step has padding: decodes of context 0, whose slot is -1. Backends that can be
    captured read and write nothing for them, give zeros, and never look at the host copies.

    block_tables: int32 [num_seqs, max_blocks], physical block ids, padded with 0.
    context_lens: int32 [num_seqs], KV length in tokens *including* this step's new tokens.
    query_start: int32 [num_seqs + 1], prefix sum of the new tokens per sequence.
    slots: int64 [num_tokens], physical slot ``block_id * block_size + offset`` of each new token.
    query_lens, context_lens_list: host copies, so that no operation has to wait for a device.
    num_decodes: leading sequences with at most `decode_query_len` new tokens.
    trees: int64 [num_tokens] or None. Beside what causality hides, a new token does not see the
        j-th new token of its own sequence where bit j of its entry is 0, for j below 64; all bits
        set (-1) hide nothing. Its own bit is set. Drafted tokens that are guesses at one place do
        not see each other. Not beside windows, which count positions.
    """

    block_tables: Tensor
    context_lens: Tensor
    query_start: Tensor
    slots: Tensor
    query_lens: list[int]
    context_lens_list: list[int]
    num_decodes: int
    decode_query_len: int = 1
    trees: Tensor | None = None

    @property
    def num_single(self) -> int:
        """Leading sequences with exactly one new token, of which most backends make a batch."""
        return self.num_decodes if self.decode_query_len == 1 else 0

    @property
    def num_tokens(self) -> int:
        """New tokens in this step, over all sequences."""
        return int(self.slots.shape[0])


def build_attention_metadata(
    block_tables: Sequence[Sequence[int]],
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    block_size: int,
    device: torch.device | str = "cpu",
    decode_query_len: int = 1,
    trees: Sequence[int] | None = None,
) -> AttentionMetadata:
    """Lay out one step from host lists.

    ``context_lens[i]`` counts the new tokens; the last ``query_lens[i]`` positions are
    new. ``trees`` has an entry for each new token. Raises ValueError if a block table is too short
    or a context shorter than its new tokens.
    """
    num_decodes = 0
    while num_decodes < len(query_lens) and query_lens[num_decodes] <= decode_query_len:
        num_decodes += 1
    slots: list[int] = []
    query_start = [0]
    for i, (table, new, context) in enumerate(
        zip(block_tables, query_lens, context_lens, strict=True)
    ):
        if new < 1 or context < new:
            raise ValueError(f"sequence {i}: {new} new tokens do not fit a context of {context}")
        if len(table) * block_size < context:
            raise ValueError(
                f"sequence {i}: {len(table)} blocks of {block_size} hold less than {context} tokens"
            )
        slots += [
            table[position // block_size] * block_size + position % block_size
            for position in range(context - new, context)
        ]
        query_start.append(query_start[-1] + new)
    width = max((len(table) for table in block_tables), default=0)
    padded = [list(table) + [0] * (width - len(table)) for table in block_tables]
    return AttentionMetadata(
        block_tables=torch.tensor(padded, dtype=torch.int32, device=device).view(
            len(block_tables), width
        ),
        context_lens=torch.tensor(list(context_lens), dtype=torch.int32, device=device),
        query_start=torch.tensor(query_start, dtype=torch.int32, device=device),
        slots=torch.tensor(slots, dtype=torch.int64, device=device),
        query_lens=list(query_lens),
        context_lens_list=list(context_lens),
        num_decodes=num_decodes,
        decode_query_len=decode_query_len,
        trees=None if trees is None else torch.tensor(trees, dtype=torch.int64, device=device),
    )
