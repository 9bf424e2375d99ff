"""Promises of the drafts that were chosen."""

from __future__ import annotations

import pytest

from engine.speculate.promises import Promises


def test_broken_promises_are_believed_less() -> None:
    promises = Promises()
    assert promises.factor(64) == 1.0
    for _ in range(300):
        promises.promise(64, 8, 6.0 * promises.factor(64))
        promises.observe(64, 8, 3)
    assert promises.factor(64) == pytest.approx(0.5, abs=0.03)
    assert promises.factor(127) == promises.factor(64)
    assert promises.factor(128) == 1.0
    for _ in range(300):  # too little is promised now to draft anything
        promises.promise(64, 0, 0.0)
        promises.observe(64, 0, 0)
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
