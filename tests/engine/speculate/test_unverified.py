"""Drafts that were not verified, judged by what comes."""

from __future__ import annotations

import pytest
import torch

from engine.request import Request, SamplingParams
from engine.speculate.draft import Draft
from engine.speculate.unverified import MOST_FOLLOWED, Progress, UnverifiedDrafts


def request(name: str = "0") -> Request:
    return Request(name, [0], SamplingParams(), 0.0)


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        ([[5], [6], [7]], [(0, 1, False), (1, 2, False), (2, 3, False)]),
        ([[5, 6], [7, 8]], [(0, 2, False), (2, 3, False)]),
        ([[5], [9]], [(0, 1, False), (1, 1, True)]),
        ([[9]], [(0, 0, True)]),
        ([[5, 6, 9]], [(0, 2, True)]),
        ([[5], []], [(0, 1, False), None]),
    ],
)
def test_each_token_is_judged_when_it_comes(
    steps: list[list[int]], told: list[tuple[int, int, bool] | None]
) -> None:
    unverified, one = UnverifiedDrafts(), request()
    draft = Draft([5, 6, 7])
    unverified.follow(one, draft)
    found = [unverified.observe(one, tokens) for tokens in steps]
    assert [None if one is None else one[1:] for one in found] == told
    assert all(progress is None or progress.draft is draft for progress in found)
    ended = found[-1] is not None and (found[-1].wrong or found[-1].right == 3)
    assert len(unverified) == (not ended)
    assert not ended or unverified.observe(one, [5]) is None


def test_a_token_is_told_with_its_chance_after_those_before_it() -> None:
    draft = Draft([5, 6, 7, 8], chances=[0.8, 0.4, 0.3, 0.1])
    first = Progress(draft, 0, 0, wrong=True).judged()
    assert (first.token_ids, first.chances) == ([5], [0.8])
    more = Progress(draft, 1, 3, wrong=False).judged()
    assert more.token_ids == [6, 7]
    assert more.chances == pytest.approx([0.5, 0.375])
    last = Progress(draft, 3, 3, wrong=True).judged()
    assert last.chances == pytest.approx([1 / 3])
    assert Progress(Draft([5, 6]), 0, 1, wrong=True).judged().chances is None


def test_the_first_draft_is_followed_to_its_end() -> None:
    unverified, one = UnverifiedDrafts(), request()
    unverified.follow(one, Draft([5, 6]))
    assert unverified.observe(one, [5]) is not None
    unverified.follow(one, Draft([1, 1]))
    progress = unverified.observe(one, [6])
    assert progress is not None
    assert (progress.right, progress.wrong) == (2, False)
    assert not len(unverified)


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
