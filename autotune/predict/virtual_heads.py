"""Guesses of Medusa's heads in virtual time, of which the engine's own trees are made.

How sure heads are differs from place to place, and of all of them together: where a text is easy
they all know it. So one number says how easy a place is, and with it how sure each head is of its
likeliest guess; the others share the rest, less to each.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

from engine.speculate.draft import Draft
from engine.speculate.medusa_tree import MOST_RANKS, likeliest_trees

Floats = NDArray[np.float64]

# The sum of the parameters of the beta distribution that a head's sureness has, and what the second
# guess and those behind it have of what the first one leaves: of heads trained for the embedded
# model, on source code.
SURENESS = 2.0
OTHERS = (0.17, 0.09, 0.06, 0.05, 0.04, 0.03, 0.025, 0.02, 0.02)
# Places that heads are fitted at, and turns of that; places to choose from where it is known how
# deep a tree went.
_PLACES = 2000
_KNOWN_PLACES = 3000
_TURNS = 8
_LEAST, _MOST = 0.01, 0.99
_GRID = np.linspace(0.002, 0.998, 250)


@dataclass(frozen=True, slots=True)
class Place:
    """A place in a text: how easy it is, and for each head where the right token lies, 0..1."""

    ease: float
    right: tuple[float, ...]

    @classmethod
    def drawn(cls, draw: random.Random, num_heads: int) -> Place:
        """Any place."""
        return cls(draw.random(), tuple(draw.random() for _ in range(num_heads)))


@dataclass(frozen=True, slots=True)
class Heads:
    """Heads as they were measured.

    `means` is of each head the share of places at which its likeliest guess is right; `nodes` the
    tokens of the trees that told.
    """

    means: tuple[float, ...]
    nodes: int

    def __len__(self) -> int:
        return len(self.means)


def virtual_trees(
    means: Sequence[float],
    places: Sequence[Place],
    limits: Sequence[int],
    following: Sequence[Sequence[int]],
    wrong: int,
) -> list[Draft]:
    """The trees that the engine would make of heads' guesses.

    Args:
        means: see `Heads`.
        places: where in the texts.
        limits: most tokens of each tree, at least 1.
        following: the tokens that come at each place; past their end nothing is right.
        wrong: this token and those behind it are nowhere right.
    """
    chances = np.empty((len(places), len(means), MOST_RANKS), dtype=np.float32)
    ease = np.array([place.ease for place in places])
    for head, mean in enumerate(means):
        first = np.interp(ease, _GRID, _quantiles(round(mean, 4)))
        chances[:, head, 0] = first
        chances[:, head, 1:] = np.minimum((1.0 - first)[:, None] * OTHERS, first[:, None])
    drawn = np.array([place.right for place in places])[:, :, None]
    ranks = (np.cumsum(chances, axis=2) <= drawn).sum(axis=2)  # `MOST_RANKS` if none is right
    tokens = np.empty(chances.shape, dtype=np.int64)
    tokens[:] = wrong + np.arange(MOST_RANKS)
    for row, coming in enumerate(following):
        for head, token in enumerate(coming[: len(means)]):
            if ranks[row, head] < MOST_RANKS:
                tokens[row, head, ranks[row, head]] = token
    # As the engine does: no more ranks than the longest draft may have tokens.
    most = min(MOST_RANKS, max(limits))
    return likeliest_trees(tokens[..., :most], chances[..., :most], limits)


@lru_cache(maxsize=16)
def fitted_heads(acceptance: tuple[float, ...], nodes: int) -> Heads:
    """Heads whose trees of `nodes` tokens are accepted as often as was measured.

    `acceptance` is the chance that a depth has a right token once the depths before it had.
    """
    wanted = np.clip(acceptance, _LEAST, _MOST)
    logits = _logit(wanted)
    places = _some_places(_PLACES, len(wanted))
    means = wanted
    for _ in range(_TURNS):
        depths = np.array(_depths(means.tolist(), places, nodes))
        reached = np.array([(depths >= d).sum() for d in range(len(wanted) + 1)])
        # As if one more had been right, and one more wrong.
        found = (reached[1:] + 1.0) / (reached[:-1] + 2.0)
        logits += _logit(wanted) - _logit(found)
        means = np.clip(1.0 / (1.0 + np.exp(-logits)), _LEAST, _MOST)
        logits = _logit(means)
    return Heads(tuple(round(float(mean), 4) for mean in means), nodes)


@lru_cache(maxsize=16)
def places_by_depth(heads: Heads) -> tuple[tuple[Place, ...], ...]:
    """Places by how deep a tree of `heads.nodes` tokens is right there.

    Where there is none of a depth, those of the depth before.
    """
    places = _some_places(_KNOWN_PLACES, len(heads))
    found: list[list[Place]] = [[] for _ in range(len(heads) + 1)]
    for place, depth in zip(places, _depths(heads.means, places, heads.nodes), strict=True):
        found[depth].append(place)
    filled: list[tuple[Place, ...]] = []
    for each in found:
        filled.append(tuple(each) or (filled[-1] if filled else tuple(places)))
    return tuple(filled)


def _some_places(count: int, num_heads: int) -> list[Place]:
    draw = random.Random(0)
    return [Place.drawn(draw, num_heads) for _ in range(count)]


def _depths(means: Sequence[float], places: Sequence[Place], nodes: int) -> list[int]:
    coming = range(len(means))
    trees = virtual_trees(means, places, [nodes] * len(places), [coming] * len(places), len(means))
    return [len(tree.right_path(coming)) for tree in trees]


def _logit(chances: Floats) -> Floats:
    return np.asarray(np.log(chances / (1.0 - chances)), dtype=np.float64)


@lru_cache(maxsize=256)
def _quantiles(mean: float) -> Floats:
    mean = min(max(mean, _LEAST), _MOST)
    return np.asarray(beta.ppf(_GRID, SURENESS * mean, SURENESS * (1.0 - mean)), dtype=np.float64)
