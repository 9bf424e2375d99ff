"""Which guesses of Medusa's heads are verified: the likeliest paths, as a tree.

A node is a path of ranks: the guess of rank r1 of the first head, followed by that of rank r2 of
the second, and so on. Its chance is the product of its guesses' chances, as if heads were
independent (Medusa, section 2.3.3, chooses its tree by the same product over measured accuracies);
the chances used here are those of the very hidden state, so that each tree fits its place in the
text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from engine.speculate.draft import Draft

# Trees grow wide long before a rank beyond this is worth a node.
MOST_RANKS = 10


@dataclass(frozen=True, slots=True)
class TreeNodes:
    """Nodes that can be among the likeliest, parents before children.

    `head`, `rank` and `parent` (-1 at the root) by node. `by_depth` are the nodes of each depth, in
    order.
    """

    head: NDArray[np.int64]
    rank: NDArray[np.int64]
    parent: NDArray[np.int64]
    by_depth: tuple[slice, ...]


@lru_cache(maxsize=256)
def possible_nodes(num_heads: int, num_ranks: int, most: int) -> TreeNodes:
    """All nodes that the `most` likeliest can hold, whatever the chances, which fall with rank.

    A node is never likelier than one of no greater depth whose ranks are no higher: at depth d and
    ranks r there are sum over j <= d of prod over i <= j of (r_i + 1) of these, itself included.
    Where that is above `most`, the node cannot be one of the `most` likeliest.
    """
    heads: list[int] = []
    ranks: list[int] = []
    parents: list[int] = []
    by_depth: list[slice] = []
    # Of each node of the last depth: its index, the product and the sum of above.
    level = [(-1, 1, 0)]
    for head in range(num_heads):
        start, following = len(heads), []
        for parent, product, total in level:
            for rank in range(num_ranks):
                wider = product * (rank + 1)
                if total + wider > most:
                    break
                following.append((len(heads), wider, total + wider))
                heads.append(head)
                ranks.append(rank)
                parents.append(parent)
        if not following:
            break
        by_depth.append(slice(start, len(heads)))
        level = following
    return TreeNodes(np.array(heads), np.array(ranks), np.array(parents), tuple(by_depth))


def calibrated(
    probabilities: NDArray[np.float32], calibration: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    """Chances that guesses are right: probabilities [n, heads, ranks] by what was measured.

    calibration: [heads, ranks], or None for none. Chances stay below 1 and fall with rank, as the
    heads' own probabilities do.
    """
    if calibration is None:
        return probabilities
    chances = np.minimum(probabilities * calibration, np.float32(1.0))
    return np.minimum.accumulate(chances, axis=-1)


def likeliest_trees(
    token_ids: NDArray[np.int64], chances: NDArray[np.float32], limits: Sequence[int]
) -> list[Draft]:
    """The likeliest nodes of each row, most likely first, as drafts of at most so many tokens.

    token_ids int64 and chances float32 [n, heads, ranks], the latter falling with rank; limits are
    at least 1. A parent comes before its children: any first part of a draft is the likeliest tree
    of its size. A draft whose tokens are one path is a chain.
    """
    count, num_heads, num_ranks = chances.shape
    nodes = possible_nodes(num_heads, num_ranks, max(limits))
    of_node = chances[:, nodes.head, nodes.rank]
    for depth in nodes.by_depth[1:]:
        of_node[:, depth] *= of_node[:, nodes.parent[depth]]
    # Stable, so that of equals the parent, which has the lower index, comes first.
    chosen = np.argsort(-of_node, axis=1, kind="stable")[:, : max(limits)]
    rows = np.arange(count)[:, None]
    places = np.empty(of_node.shape, dtype=np.int64)
    places[rows, chosen] = np.arange(chosen.shape[1])
    above = nodes.parent[chosen]
    parents = np.where(above < 0, -1, places[rows, above])
    chain_lengths = (parents == np.arange(-1, chosen.shape[1] - 1)).cumprod(axis=1).sum(axis=1)
    by_row = zip(
        token_ids[rows, nodes.head[chosen], nodes.rank[chosen]].tolist(),
        parents.tolist(),
        of_node[rows, chosen].tolist(),
        chain_lengths.tolist(),
        limits,
        strict=True,
    )
    return [
        Draft(
            tokens[:limit],
            # Of one path, without a branch.
            None if length >= min(limit, len(tokens)) else above_them[:limit],
            chances=found[:limit],
        )
        for tokens, above_them, found, length, limit in by_row
    ]
