"""How often heads are right: shares, calibration and what trees yield, on heads that are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autotune.medusa.accuracy import calibration, judge, tree_yield
from autotune.medusa.samples import NO_TARGET, Samples
from engine.speculate.medusa_heads import Guesses
from engine.speculate.medusa_tree import MOST_RANKS, likeliest_trees

PLACES, HEADS, VOCABULARY = 3000, 3, 200


class KnownHeads:
    """Guesses that are right as often as `chances` [heads, ranks] say, and say `said`."""

    def __init__(self, chances: np.ndarray, said: np.ndarray) -> None:
        rng = np.random.default_rng(7)
        self.token_ids = np.stack(
            [
                np.stack([rng.permutation(VOCABULARY)[:MOST_RANKS] for _ in range(HEADS)])
                for _ in range(PLACES)
            ]
        )
        missed = 1.0 - chances.sum(-1, keepdims=True)
        bounds = np.concatenate([chances, missed], axis=-1).cumsum(-1)
        drawn = (rng.uniform(size=(PLACES, HEADS, 1)) > bounds).sum(-1)
        padded = np.concatenate([self.token_ids, np.full((PLACES, HEADS, 1), VOCABULARY)], axis=-1)
        self.targets = np.take_along_axis(padded, drawn[..., None], axis=-1)[..., 0]
        self.said = np.broadcast_to(said, (PLACES, HEADS, MOST_RANKS)).astype(np.float32)
        self.asked = 0

    def guesses(self, hidden: torch.Tensor, ranks: int) -> Guesses:
        assert ranks == MOST_RANKS
        here = slice(self.asked, self.asked + len(hidden))
        self.asked += len(hidden)
        return Guesses(
            torch.from_numpy(self.token_ids[here]), torch.from_numpy(self.said[here].copy())
        )


def table(first: list[float]) -> np.ndarray:
    """Chances of HEADS heads: those of `first` by head for the likeliest, halves after it."""
    ranks = 0.5 ** np.arange(1, MOST_RANKS)
    return np.array([[p, *((1 - p) * 0.5 * ranks)] for p in first])


def test_shares_and_calibration_are_those_of_the_heads() -> None:
    chances = table([0.7, 0.5, 0.3])
    heads = KnownHeads(chances, chances / 2)
    samples = Samples(torch.zeros(PLACES, 4), torch.from_numpy(heads.targets))
    found = judge(heads, samples)  # type: ignore[arg-type]
    assert found.places == PLACES
    np.testing.assert_allclose(np.array(found.by_rank)[:, :4], chances[:, :4], atol=0.04)
    # They are right twice as often as they say.
    np.testing.assert_allclose(np.array(found.calibration)[:, :2], 2.0, rtol=0.15)
    # A chain of one token is right as often as the first head is.
    assert found.tokens_per_step[1] == pytest.approx(1.0 + found.by_rank[0][0], abs=1e-4)
    sizes = list(found.tokens_per_step.values())
    assert sizes == sorted(sizes)
    told = found.to_json()
    assert told["places"] == PLACES
    assert told["tokens_per_step"]["1"] == pytest.approx(sizes[0], abs=1e-3)


def test_a_head_is_judged_where_those_before_it_were_right() -> None:
    # The second head is right exactly where the first one is, and says one half everywhere.
    hits = np.zeros((100, 2, 2), dtype=bool)
    hits[:50, 0, 0] = hits[:50, 1, 0] = True
    probabilities = np.full((100, 2, 2), 0.5, dtype=np.float32)
    targets = np.zeros((100, 2), dtype=np.int64)
    found = calibration(hits, probabilities, targets)
    np.testing.assert_allclose(found[0], [51 / 51, 1 / 51])
    np.testing.assert_allclose(found[1], [51 / 26, 1 / 26])
    targets[:, 1] = NO_TARGET  # then nothing is known of it
    np.testing.assert_allclose(calibration(hits, probabilities, targets)[1], 1.0)


def test_places_at_the_end_of_a_sequence_have_fewer_targets() -> None:
    heads = KnownHeads(table([0.9, 0.9, 0.9]), table([0.9, 0.9, 0.9]))
    targets = heads.targets.copy()
    targets[::2, 1:] = NO_TARGET
    samples = Samples(torch.zeros(PLACES, 4), torch.from_numpy(targets))
    found = judge(heads, samples)  # type: ignore[arg-type]
    assert [row[0] for row in found.by_rank] == pytest.approx([0.9, 0.9, 0.9], abs=0.03)


def test_a_tree_yields_the_path_that_really_follows() -> None:
    token_ids = np.array([[[1, 2], [3, 4]]])
    chances = np.array([[[0.7, 0.2], [0.5, 0.4]]], dtype=np.float32)
    (draft,) = likeliest_trees(token_ids, chances, [6])
    assert len(draft) == 6
    for following, expected in (([1, 3], 3), ([2, 4], 3), ([2, 9], 2), ([9, 3], 1), ([3, 4], 1)):
        found = tree_yield(token_ids, chances, np.array([following]), 6)
        assert found == expected
    # The chain 1, 3 does not hold what follows 2.
    assert tree_yield(token_ids, chances, np.array([[2, 4]]), 2) == 1.0
