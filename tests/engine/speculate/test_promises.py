"""Promises of the drafts that were chosen."""

from __future__ import annotations

import pytest

from engine.speculate.promises import Promises


def test_broken_promises_are_believed_less() -> None:
    promises = Promises()
    assert promises.factor(64) == 1.0
    for _ in range(300):
        promises.promise(64, 32, 24.0 * promises.factor(64))
        promises.observe(64, 32, 6)
    # A quarter is kept; ten tokens' worth of doubt is left beside those that are remembered.
    assert 0.25 < promises.factor(64) < 0.4
    assert promises.factor(127) == promises.factor(64)
    assert promises.factor(128) == 1.0


@pytest.mark.parametrize("others", [64, 200])
def test_what_was_broken_once_is_soon_forgotten(others: int) -> None:
    # Also while other numbers of sequences decode, and however much it was.
    promises = Promises()
    promises.promise(64, 400, 300.0)
    promises.observe(64, 400, 0)
    assert promises.factor(64) < 0.2
    for _ in range(40):  # too little is promised to draft anything
        promises.promise(others, 0, 0.0)
        promises.observe(others, 0, 0)
    assert promises.factor(64) > 0.9


def test_kept_promises_and_more_change_nothing() -> None:
    promises = Promises()
    for _ in range(100):
        promises.promise(4, 8, 4.0)
        promises.observe(4, 8, 5)
    assert promises.factor(4) == 1.0


def test_a_step_that_was_another_tells_nothing() -> None:
    promises = Promises()
    promises.observe(4, 8, 0)
    for _ in range(100):
        promises.promise(4, 8, 6.0)
        promises.observe(4, 7, 0)  # blocks were short
        promises.observe(4, 8, 0)  # nothing was promised of this one
    assert promises.factor(4) == 1.0
