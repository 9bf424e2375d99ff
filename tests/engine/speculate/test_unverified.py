"""Drafts that were not verified, judged by what comes."""

from __future__ import annotations

import pytest
import torch

from engine.request import Request, SamplingParams
from engine.speculate.draft import Draft
from engine.speculate.unverified import MOST_FOLLOWED, UnverifiedDrafts


def request(name: str = "0") -> Request:
    return Request(name, [0], SamplingParams(), 0.0)


@pytest.mark.parametrize(
    ("steps", "right"),
    [([[5], [6], [7]], 3), ([[5, 6], [7, 8]], 3), ([[5], [9]], 1), ([[9]], 0), ([[5, 6, 9]], 2)],
)
def test_verdict(steps: list[list[int]], right: int) -> None:
    unverified, one = UnverifiedDrafts(), request()
    draft = Draft([5, 6, 7])
    unverified.follow(one, draft)
    verdicts = [unverified.observe(one, tokens) for tokens in steps]
    assert verdicts[:-1] == [None] * (len(steps) - 1)
    verdict = verdicts[-1]
    assert verdict is not None
    assert verdict.request is one
    assert verdict.draft is draft
    assert list(verdict.path) == list(range(right))
    assert not len(unverified)
    assert unverified.observe(one, [5]) is None


def test_the_first_draft_is_followed_to_its_end() -> None:
    unverified, one = UnverifiedDrafts(), request()
    unverified.follow(one, Draft([5, 6]))
    assert unverified.observe(one, [5]) is None
    unverified.follow(one, Draft([1, 1]))
    verdict = unverified.observe(one, [6])
    assert verdict is not None
    assert len(verdict.path) == 2


def test_what_cannot_be_judged_so_is_not_followed() -> None:
    unverified = UnverifiedDrafts()
    unverified.follow(request(), Draft([5, 6], parents=[-1, -1]))
    unverified.follow(request(), Draft([5], probabilities=torch.ones(1, 4) / 4))
    assert not len(unverified)


def test_only_some_are_followed() -> None:
    unverified = UnverifiedDrafts()
    some = [request(str(i)) for i in range(2 * MOST_FOLLOWED)]
    for one in some:
        unverified.follow(one, Draft([5]))
    assert len(unverified) == MOST_FOLLOWED
    unverified.forget(some[0])
    assert len(unverified) == MOST_FOLLOWED - 1
    unverified.forget(some[-1])
