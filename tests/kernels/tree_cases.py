"""Random trees of drafted tokens as attention's masks, and cases of attention with them."""

from dataclasses import replace

import torch

from kernels import ops
from tests.kernels.attention_cases import Case, make_case


def masks_of(parents: list[int]) -> list[int]:
    """The masks of a request's last token and of a draft with these parents (-1: that token).

    Each sees itself and those it follows; int64, so that bit 63 is the sign.
    """
    masks = [1]
    for i, parent in enumerate(parents):
        masks.append(masks[parent + 1] | 1 << (i + 1))
    return [mask - (1 << 64) if mask >> 63 else mask for mask in masks]


def random_parents(count: int, generator: torch.Generator) -> list[int]:
    """A tree of so many drafted tokens, parents before their children."""
    return [int(torch.randint(-1, i, (), generator=generator)) if i else -1 for i in range(count)]


def make_tree_case(
    dtype: torch.dtype,
    head_dim: int,
    kv_heads: int,
    group: int,
    block_size: int,
    sequences: list[tuple[int, int, bool]],
    generator: torch.Generator,
    cache_dtype: torch.dtype | None = None,
    soft_cap: float = 0.0,
    decode_query_len: int = 1,
) -> Case:
    """Sequences are (new tokens, context, whether those are a random tree: at most 64 then)."""
    lengths = [(new, context) for new, context, _ in sequences]
    case = make_case(
        dtype, head_dim, kv_heads, group, block_size, lengths, generator, cache_dtype, 0, soft_cap
    )
    trees: list[int] = []
    for new, _, is_tree in sequences:
        trees += masks_of(random_parents(new - 1, generator)) if is_tree else [-1] * new
    metadata = ops.build_attention_metadata(
        case.tables,
        [new for new, _ in lengths],
        [context for _, context in lengths],
        block_size,
        decode_query_len=decode_query_len,
        trees=trees,
    )
    return replace(case, metadata=metadata)
