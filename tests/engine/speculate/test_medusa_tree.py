"""Trees of guesses: always the likeliest, against a search of all paths."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.speculate.draft import MOST_DRAFTED
from engine.speculate.medusa_tree import calibrated, likeliest_trees, possible_nodes


def guesses(rng: np.random.Generator, rows: int, heads: int, ranks: int):
    """Token ids, different in each row's head, and chances that fall with rank."""
    token_ids = np.stack(
        [np.stack([rng.permutation(1000)[:ranks] for _ in range(heads)]) for _ in range(rows)]
    )
    sharpness = rng.uniform(0.2, 5.0, (rows, heads, 1))
    chances = rng.uniform(size=(rows, heads, ranks)) ** sharpness
    chances = -np.sort(-chances, axis=-1) / chances.sum(-1, keepdims=True)
    return token_ids, chances.astype(np.float32)


def all_paths(chances: np.ndarray) -> list[tuple[float, tuple[int, ...]]]:
    """Every path of ranks with its chance in double precision, likeliest first."""
    heads, ranks = chances.shape
    exact = chances.astype(np.float64)
    paths = [
        (math.prod(exact[head, rank] for head, rank in enumerate(path)), path)
        for depth in range(1, heads + 1)
        for path in itertools.product(range(ranks), repeat=depth)
    ]
    return sorted(paths, key=lambda entry: -entry[0])


@given(
    seed=st.integers(0, 2**32 - 1),
    heads=st.integers(1, 4),
    ranks=st.integers(1, 5),
    limits=st.lists(st.integers(1, MOST_DRAFTED), min_size=1, max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_trees_hold_the_likeliest_paths(
    seed: int, heads: int, ranks: int, limits: list[int]
) -> None:
    rng = np.random.default_rng(seed)
    token_ids, chances = guesses(rng, len(limits), heads, ranks)
    for row, draft in enumerate(likeliest_trees(token_ids, chances, limits)):
        expected = all_paths(chances[row])[: limits[row]]
        assert len(draft) == len(expected)
        assert draft.chances is not None
        np.testing.assert_allclose(draft.chances, [chance for chance, _ in expected], rtol=1e-5)
        # Each node's tokens are those of a path of heads, and its chance is the path's.
        for index, chance in enumerate(draft.chances):
            path = [draft.token_ids[node] for node in draft.path(index)]
            ranked = [list(token_ids[row, head]).index(token) for head, token in enumerate(path)]
            product = math.prod(float(chances[row, h, r]) for h, r in enumerate(ranked))
            assert chance == pytest.approx(product, rel=1e-5)


@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, MOST_DRAFTED))
@settings(max_examples=40, deadline=None)
def test_any_first_part_is_a_tree_with_falling_chances(seed: int, size: int) -> None:
    token_ids, chances = guesses(np.random.default_rng(seed), 1, 4, 10)
    (draft,) = likeliest_trees(token_ids, chances, [size])
    parents = draft.parents if draft.parents is not None else list(range(-1, size - 1))
    assert all(parent < index for index, parent in enumerate(parents))
    children = list(zip(parents, draft.token_ids, strict=True))
    assert len(set(children)) == len(children), "children of one parent differ"
    assert draft.chances is not None
    assert all(a >= b for a, b in itertools.pairwise(draft.chances))
    first = draft.first(size // 2)
    if len(first):
        (smaller,) = likeliest_trees(token_ids, chances, [size // 2])
        assert list(first.token_ids) == list(smaller.token_ids)


def test_equals_put_the_parent_first() -> None:
    token_ids = np.arange(8).reshape(1, 4, 2)
    chances = np.ones((1, 4, 2), dtype=np.float32)
    (draft,) = likeliest_trees(token_ids, chances, [30])
    assert draft.parents is not None
    assert len(draft) == 2 + 4 + 8 + 16
    assert all(parent < index for index, parent in enumerate(draft.parents))


def test_a_single_path_is_a_chain() -> None:
    token_ids = np.arange(3).reshape(1, 3, 1)
    chances = np.full((1, 3, 1), 0.5, dtype=np.float32)
    (draft,) = likeliest_trees(token_ids, chances, [8])
    assert (draft.token_ids, draft.parents, draft.chances) == ([0, 1, 2], None, [0.5, 0.25, 0.125])
    token_ids, chances = guesses(np.random.default_rng(0), 1, 3, 4)
    (one,) = likeliest_trees(token_ids, chances, [1])
    assert (one.token_ids, one.parents) == ([token_ids[0, 0, 0]], None)


def test_few_nodes_can_be_among_the_likeliest() -> None:
    # Of 11,110 paths of 4 heads and 10 ranks.
    assert len(possible_nodes(4, 10, 16).head) < 200
    assert len(possible_nodes(4, 10, MOST_DRAFTED).head) < 1500
    one = possible_nodes(4, 10, 1)
    assert (one.head.tolist(), one.rank.tolist(), one.parent.tolist()) == ([0], [0], [-1])


def test_calibrated_chances_fall_with_rank_and_stay_below_one() -> None:
    probabilities = np.array([[[0.8, 0.1, 0.05]]], dtype=np.float32)
    table = np.array([[2.0, 1.0, 4.0]], dtype=np.float32)
    np.testing.assert_allclose(calibrated(probabilities, table), [[[1.0, 0.1, 0.1]]])
    assert calibrated(probabilities, None) is probabilities
