"""Guesses of heads in virtual time: right as often as was measured, and as sure as that."""

from __future__ import annotations

import random

import numpy as np
import pytest

from autotune.predict.virtual_heads import (
    Heads,
    Place,
    fitted_heads,
    places_by_depth,
    virtual_trees,
)

WRONG = 1 << 41
COMING = (11, 12, 13, 14)


def some_places(seed: int, count: int = 3000) -> list[Place]:
    draw = random.Random(seed)
    return [Place.drawn(draw, len(COMING)) for _ in range(count)]


def depths(heads: Heads, places: list[Place], nodes: int) -> np.ndarray:
    count = len(places)
    trees = virtual_trees(heads.means, places, [nodes] * count, [COMING] * count, WRONG)
    assert all(len(tree) <= nodes for tree in trees)
    return np.array([len(tree.right_path(COMING)) for tree in trees])


@pytest.mark.parametrize(
    ("acceptance", "nodes"),
    [((0.69, 0.42, 0.55, 0.8), 11), ((0.5, 0.5, 0.4, 0.3), 4), ((0.9, 0.8, 0.7, 0.6), 20)],
)
def test_fitted_heads_are_right_as_often_as_was_measured(
    acceptance: tuple[float, ...], nodes: int
) -> None:
    """At places that they were not fitted at."""
    heads = fitted_heads(acceptance, nodes)
    assert heads.nodes == nodes
    found = depths(heads, some_places(5), nodes)
    for depth, chance in enumerate(acceptance):
        reached = found >= depth
        if reached.sum() > 200:
            assert (found[reached] > depth).mean() == pytest.approx(chance, abs=0.08)


def test_larger_trees_yield_more_but_less_for_each_token() -> None:
    heads = fitted_heads((0.69, 0.42, 0.55, 0.8), 11)
    places = some_places(6)
    means = np.array([depths(heads, places, nodes).mean() for nodes in (1, 2, 4, 8, 16)])
    assert (np.diff(means) > 0).all()
    assert (np.diff(means) / [1, 2, 4, 8] < means[0]).all()


def test_heads_know_how_sure_they_are() -> None:
    heads = Heads((0.6, 0.5, 0.4, 0.3), 6)
    places = some_places(7)
    trees = virtual_trees(heads.means, places, [1] * 3000, [COMING] * 3000, WRONG)
    told = np.array([tree.chances[0] for tree in trees if tree.chances])
    right = np.array([tree.token_ids[0] == COMING[0] for tree in trees])
    assert told.mean() == pytest.approx(0.6, abs=0.02)
    for low, high in ((0.0, 0.4), (0.4, 0.8), (0.8, 1.0)):
        these = (told >= low) & (told < high)
        assert right[these].mean() == pytest.approx(told[these].mean(), abs=0.06)


def test_places_are_as_deep_as_is_said() -> None:
    heads = fitted_heads((0.69, 0.42, 0.55, 0.8), 11)
    by_depth = places_by_depth(heads)
    assert len(by_depth) == 5
    for depth, places in enumerate(by_depth):
        assert (depths(heads, list(places), heads.nodes) == depth).all()


def test_where_no_tree_goes_deep_a_less_deep_one_serves() -> None:
    by_depth = places_by_depth(Heads((0.99, 0.01, 0.01, 0.01), 1))
    assert by_depth[4] == by_depth[1] != by_depth[0]


def test_nothing_is_right_past_the_end() -> None:
    places = some_places(8, 500)
    trees = virtual_trees((0.9, 0.9, 0.9, 0.9), places, [8] * 500, [(11,)] * 500, WRONG)
    assert {token for tree in trees for token in tree.token_ids if token < WRONG} == {11}
