"""Drafts from Medusa's heads: the likeliest tree of each request's newest hidden state."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from engine.request import Request
from engine.speculate.draft import Draft
from engine.speculate.hidden_states import HiddenStates
from engine.speculate.medusa_heads import Guesses, MedusaHeads
from engine.speculate.medusa_tree import MOST_RANKS, calibrated, likeliest_trees


class Medusa:
    """The `Proposer` of a model with Medusa heads.

    Args:
        heads: the heads, on the model's device.
        states: what the model made of each request's tokens so far.
        branches: whether drafts may be trees; those of a model with windowed layers are chains
            (see `AttentionMetadata.trees`).
    """

    costs_device = True

    def __init__(self, heads: MedusaHeads, states: HiddenStates, *, branches: bool = True) -> None:
        self._heads = heads
        self._states = states
        self._most_ranks = MOST_RANKS if branches else 1
        self._calibration = _table(heads.calibration)

    def propose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[Draft | None]:
        """A tree for each request whose hidden state is known and whose limit is not 0."""
        drafts: list[Draft | None] = [None] * len(requests)
        asked = [place for place, limit in enumerate(limits) if limit > 0]
        if not asked:
            return drafts
        with torch.inference_mode():
            hidden, known = self._states.of([requests[place] for place in asked])
            if not known:
                return drafts
            places = [asked[place] for place in known]
            most = [limits[place] for place in places]
            guesses = self._heads.guesses(hidden, min(self._most_ranks, max(most)))
            token_ids, probabilities = _on_host(guesses)
        table = self._calibration
        if table is not None:
            table = table[:, : probabilities.shape[-1]]
        chances = calibrated(probabilities, table)
        trees = likeliest_trees(token_ids, chances, most)
        for place, tree in zip(places, trees, strict=True):
            drafts[place] = tree
        return drafts

    def clear(self) -> None:
        """See `Proposer`; nothing is kept."""

    def forget(self, request: Request) -> None:
        """Nothing is kept by request."""


def _on_host(guesses: Guesses) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    token_ids, probabilities = guesses
    if token_ids.is_cuda:
        # One transfer for both: token ids are exact in float64.
        both = torch.stack([token_ids.double(), probabilities.double()]).cpu()
        token_ids, probabilities = both[0].long(), both[1].float()
    return token_ids.numpy(), probabilities.numpy()


def _table(calibration: Sequence[Sequence[float]]) -> NDArray[np.float32] | None:
    """[heads, MOST_RANKS]; ranks that were not measured have the last one's value."""
    if not calibration:
        return None
    rows = [[*row[:MOST_RANKS], *[row[-1]] * (MOST_RANKS - len(row))] for row in calibration]
    return np.array(rows, dtype=np.float32)
