"""How often trained heads are right, on places that they have not learned from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from autotune.medusa.samples import NO_TARGET, Samples
from engine.speculate.draft import Draft
from engine.speculate.medusa_heads import MedusaHeads
from engine.speculate.medusa_tree import MOST_RANKS, calibrated, likeliest_trees

TREE_SIZES = (1, 2, 4, 8, 16, 32)
_PLACES_AT_ONCE = 512
# Trees are walked in Python; so many tell the mean to about 2%.
_MOST_TREES = 4000
_MOST_PLACES = 20_000


@dataclass(frozen=True, slots=True)
class Accuracy:
    """What heads reach on held-out places.

    by_rank: for each head, how often its likeliest, second, ... guess was the token; shares of the
    places where there is one. calibration: `MedusaWeights.calibration`. tokens_per_step: by the
    tokens of a tree, how many a step that verifies it yields, its own one included.
    """

    by_rank: tuple[tuple[float, ...], ...]
    calibration: tuple[tuple[float, ...], ...]
    tokens_per_step: dict[int, float]
    places: int

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "by_rank": [[round(share, 4) for share in row] for row in self.by_rank],
            "tokens_per_step": {str(k): round(v, 4) for k, v in self.tokens_per_step.items()},
            "places": self.places,
        }


def judge(heads: MedusaHeads, samples: Samples) -> Accuracy:
    """Let heads guess at held-out places, of which there must be some."""
    stride = -(-len(samples) // _MOST_PLACES)
    states, targets = samples.states[::stride], samples.targets[::stride].cpu().numpy()
    parts = []
    with torch.inference_mode():
        for start in range(0, len(states), _PLACES_AT_ONCE):
            guesses = heads.guesses(states[start : start + _PLACES_AT_ONCE], MOST_RANKS)
            parts.append((guesses.token_ids.cpu().numpy(), guesses.probabilities.cpu().numpy()))
    token_ids = np.concatenate([ids for ids, _ in parts])
    probabilities = np.concatenate([chances for _, chances in parts])
    hits = token_ids == targets[..., None]
    known = (targets != NO_TARGET).sum(axis=0).clip(min=1)
    shares = hits.sum(axis=0) / known[:, None]
    table = calibration(hits, probabilities, targets)
    chances = calibrated(probabilities, table)
    whole = np.flatnonzero((targets != NO_TARGET).all(axis=1))
    whole = whole[:: max(1, len(whole) // _MOST_TREES)]
    yields = {
        size: tree_yield(token_ids[whole], chances[whole], targets[whole], size)
        for size in TREE_SIZES
        if len(whole)
    }
    return Accuracy(_rows(shares), _rows(table), yields, len(targets))


def calibration(
    hits: NDArray[np.bool_], probabilities: NDArray[np.float32], targets: NDArray[np.int64]
) -> NDArray[np.float32]:
    """How many times as often guesses were right as their probabilities said, [heads, ranks].

    hits and probabilities: [places, heads, ranks]; targets: [places, heads]. A head is asked about
    a place only where every head before it had the token among its guesses, as in a tree; a guess
    that was never looked at counts as right as often as it said.
    """
    num_heads, num_ranks = hits.shape[1:]
    table = np.empty((num_heads, num_ranks), dtype=np.float32)
    reached = np.ones(len(hits), dtype=bool)
    for head in range(num_heads):
        asked = reached & (targets[:, head] != NO_TARGET)
        right = hits[asked, head].sum(axis=0)
        said = probabilities[asked, head].sum(axis=0)
        table[head] = (right + 1.0) / (said + 1.0)
        reached &= hits[:, head].any(axis=1)
    return table


def tree_yield(
    token_ids: NDArray[np.int64],
    chances: NDArray[np.float32],
    targets: NDArray[np.int64],
    size: int,
) -> float:
    """Mean tokens of a step that verifies the likeliest tree of `size` tokens at each place."""
    drafts = likeliest_trees(token_ids, chances, [size] * len(targets))
    accepted = [_accepted(draft, row) for draft, row in zip(drafts, targets.tolist(), strict=True)]
    return 1.0 + float(np.mean(accepted))


def _accepted(draft: Draft, following: list[int]) -> int:
    """How many of the tokens that really follow are a path of the draft."""
    parents = draft.parents if draft.parents is not None else range(-1, len(draft) - 1)
    nodes = {
        (parent, token): index
        for index, (parent, token) in enumerate(zip(parents, draft.token_ids, strict=True))
    }
    here = -1
    for count, token in enumerate(following):
        if (here, token) not in nodes:
            return count
        here = nodes[here, token]
    return len(following)


def _rows(table: NDArray[np.floating[Any]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(round(float(value), 4) for value in row) for row in table)
