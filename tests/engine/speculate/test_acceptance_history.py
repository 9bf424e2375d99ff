"""Chances of drafted tokens, from what was accepted."""

from __future__ import annotations

import random

import numpy as np
import pytest

from engine.request import Request, SamplingParams
from engine.speculate.acceptance_history import (
    FIRST_CHANCE,
    AcceptanceHistory,
    Verified,
    odds_factor,
    with_odds_factor,
)
from engine.speculate.draft import Draft


def request(name: str = "0") -> Request:
    return Request(name, [0], SamplingParams(), 0.0)


def accepted(chances: list[float], generator: random.Random) -> int:
    count = 0
    while count < len(chances) and generator.random() < chances[count]:
        count += 1
    return count


def test_odds() -> None:
    # Twice the odds of 1/2 are 2 to 1; no evidence changes nothing, much of it tells all.
    assert with_odds_factor(np.array([0.5]), np.array([2.0]))[0] == pytest.approx(2 / 3)
    assert odds_factor(0.0, 0.0, 0.0, 0.0, 4.0) == 1.0
    exact = odds_factor(8e6, 2e6, 5e6, 5e6, 4.0)
    assert with_odds_factor(np.array([0.5]), np.array([exact]))[0] == pytest.approx(0.8, abs=1e-4)


def test_each_depth_is_learned() -> None:
    generator = random.Random(3)
    truth = [0.9, 0.5, 0.8, 0.2]
    history, one = AcceptanceHistory(), request()
    estimates = []
    for step in range(4000):
        right = accepted(truth, generator)
        history.record_chains([one], [4], [right], plain=True)
        if step > 1000:
            estimates.append(history.survival([request()], 4)[0])
    mean = np.mean(estimates, axis=0)
    assert mean == pytest.approx(np.cumprod(truth), abs=0.05)
    assert (np.diff(history.survival([one], 10)) <= 0).all()


@pytest.mark.parametrize("came", [False, True])
def test_what_goes_on_is_as_good_as_what_begins(came: bool) -> None:
    begins, goes_on, told = AcceptanceHistory(), AcceptanceHistory(), request()
    for history, start in ((begins, 0), (goes_on, 2)):
        # Two tokens were told of before.
        history.record_chains([told], [2], [2], plain=True)
        history.record_chains([told], [start + 1], [start + came], [start], plain=True)
    one = request()
    for who in (told, one):
        assert goes_on.survival([who], 1) == begins.survival([who], 1)
    before = begins.survival([one], 3)[0]
    after = goes_on.survival([one], 3)[0]
    assert after[1] == before[1]
    assert (after[2] > before[2]) == came


def test_a_short_draft_tells_nothing_of_what_lies_beyond() -> None:
    history, one = AcceptanceHistory(), request()
    for _ in range(300):
        history.record_chains([one], [2], [2], plain=True)
    first, _, third = history.survival([one], 3)[0]
    assert first > 0.95
    assert third > 0.9  # as the one before


def test_runs() -> None:
    # A draft is accepted if the one before was, nine times of ten; else once in ten.
    generator = random.Random(4)
    history, one = AcceptanceHistory(), request()
    well, told = False, {True: [], False: []}
    for _ in range(2000):
        told[well].append(history.survival([one], 1)[0, 0])
        well = generator.random() < (0.9 if well else 0.1)
        history.record_chains([one], [1], [int(well)], plain=True)
    assert np.mean(told[True]) > np.mean(told[False]) + 0.2


def test_requests_are_told_apart_with_evidence() -> None:
    generator = random.Random(5)
    history = AcceptanceHistory()
    good, poor, new = request("good"), request("poor"), request("new")
    told = []
    for _ in range(100):
        right = [accepted([0.95] * 4, generator), accepted([0.2] * 4, generator)]
        history.record_chains([good, poor], [4, 4], right, plain=True)
        told.append(history.survival([good, new, poor], 1)[:, 0])
    by_request = np.mean(told[20:], axis=0)
    assert by_request[0] > 0.7 > by_request[1] > 0.35 > by_request[2]
    history.forget(good)
    assert history.survival([good], 1) == history.survival([new], 1)


@pytest.mark.parametrize("tells", [lambda c: c**0.25, lambda c: c**3])
def test_chances_of_a_proposer_are_corrected(tells) -> None:
    generator = random.Random(6)
    history = AcceptanceHistory()
    errors, claimed = [], []
    for step in range(3000):
        chance = generator.choice([0.2, 0.5, 0.8])
        claim = tells(chance)
        one = request()
        if step > 500:
            estimate = history.calibrated([one], np.array([[claim]]))[0, 0]
            errors.append(abs(estimate - chance))
            claimed.append(abs(claim - chance))
        right = int(generator.random() < chance)
        draft = Draft([1], chances=[claim])
        history.record_chances([Verified(one, draft, range(right))])
        history.forget(one)
    assert np.mean(errors) < 0.13
    assert np.mean(errors) < np.mean(claimed) / 1.5


def test_corrected_chances_fall_within_a_draft() -> None:
    history = AcceptanceHistory()
    for claim, right in ((0.9, 0), (0.1, 1)) * 50:
        draft = Draft([1], chances=[claim])
        history.record_chances([Verified(request(), draft, range(right))])
    chances = history.calibrated([request()], np.array([[1.0, 0.9, 0.5, 0.1, 0.0]]))
    assert (np.diff(chances) <= 0).all()
    assert np.isfinite(chances).all()


def test_a_tree_by_its_tokens() -> None:
    generator = random.Random(7)
    history = AcceptanceHistory()
    assert not history.sees_trees
    tree = Draft([5, 6, 7], parents=[-1, -1, 0])
    for _ in range(1500):
        path = generator.choice([[0], [0, 2], [0, 2], [1], []])
        history.record_tree(Verified(request(), tree, path))
    assert history.sees_trees
    assert history.of_tree([request()], 3)[0] == pytest.approx([0.6, 0.2, 0.2], abs=0.12)


def test_before_anything_was_seen() -> None:
    history = AcceptanceHistory()
    assert history.survival([request()], 2)[0] == pytest.approx([FIRST_CHANCE, FIRST_CHANCE**2])
    hopeful = history.survival([request()], 2, optimism=1.0)[0]
    assert (hopeful > history.survival([request()], 2)[0]).all()
    for _ in range(200):
        history.record_chains([request()], [2], [1], plain=True)
    certain = history.survival([request()], 2, optimism=1.0) - history.survival([request()], 2)
    assert certain[0, 0] < 0.05


def test_what_went_badly_is_believed_less_the_more_text_came_since() -> None:
    history, one, fresh = AcceptanceHistory(), request(), request("new")
    for _ in range(60):
        history.record_chains([request("others")], [1], [1], plain=True)
    for _ in range(8):
        history.record_chains([one], [1], [0], plain=True)
    chances = []
    for _ in range(5):
        chances.append(float(history.survival([one], 1, 0.5)[0, 0]))
        one.token_ids += [7] * 64
    expected = float(history.survival([fresh], 1, 0.5)[0, 0])
    assert chances[0] < expected - 0.2
    assert np.all(np.diff(chances) > 0)
    assert chances[-1] == pytest.approx(expected, abs=0.02)
    # Where it is known without a try, it is not forgotten.
    assert history.survival([one], 1)[0, 0] < chances[0]


def test_a_trees_chances_with_optimism_are_higher_the_less_is_known() -> None:
    history, one = AcceptanceHistory(), request()
    tree = Draft([5, 6, 7], [-1, -1, 0])
    gaps = []
    for _ in range(3):
        for turn in range(20):
            history.record_tree(Verified(one, tree, [[0], [1], []][turn % 3]))
        likeliest, hoped = (history.of_tree([one], 3, much)[0] for much in (0.0, 1.0))
        gaps.append(hoped - likeliest)
    assert (gaps[-1] > 0).all()
    assert (gaps[0][:2] > gaps[-1][:2]).all()


@pytest.mark.parametrize("doubt", [1.0, 6.0])
def test_what_a_proposer_says_of_a_chance(doubt: float) -> None:
    """Of one that is too doubtful, less must be asked for the same chance."""
    generator = random.Random(11)
    history = AcceptanceHistory()
    for step in range(1500):
        truth = generator.uniform(0.05, 0.95)
        claim = truth / (truth + doubt * (1.0 - truth))
        one = request(str(step))
        draft = Draft([1], chances=[claim])
        history.record_chances([Verified(one, draft, range(generator.random() < truth))])
        history.forget(one)
    for chance in (0.2, 0.3, 0.5):
        told = history.told([request("a"), request("b")], chance)
        assert told == pytest.approx(chance / (chance + doubt * (1.0 - chance)), abs=0.08)
