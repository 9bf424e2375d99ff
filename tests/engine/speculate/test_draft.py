"""Drafts: which of their tokens agree with what comes."""

from __future__ import annotations

import pytest

from engine.speculate.draft import Draft

TREE = Draft([5, 6, 7, 5, 9], [-1, -1, 1, 1, 3])
CHAIN = Draft([5, 6, 7])


@pytest.mark.parametrize(
    ("draft", "coming", "path"),
    [
        (TREE, (5,), [0]),
        (TREE, (6, 5, 9), [1, 3, 4]),
        (TREE, (6, 5), [1, 3]),
        (TREE, (6, 5, 8, 9), [1, 3]),
        (TREE, (7,), []),
        (TREE, (), []),
        (CHAIN, (5, 6, 9), [0, 1]),
        (CHAIN, (5, 6, 7, 8), [0, 1, 2]),
        (CHAIN, (6,), []),
        (CHAIN, (), []),
    ],
)
def test_right_path(draft: Draft, coming: tuple[int, ...], path: list[int]) -> None:
    assert list(draft.right_path(coming)) == path
