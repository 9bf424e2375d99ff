"""Whom a look-up is tried for."""

from __future__ import annotations

from itertools import pairwise

from engine.request import Request, SamplingParams
from engine.speculate.back_off import LONGEST, TOGETHER, BackOff


def requests(count: int) -> list[Request]:
    return [Request(str(i), [0], SamplingParams(), 0.0) for i in range(count)]


def tries(back_off: BackOff, some: list[Request], steps: int, seconds: float, step: float) -> int:
    """How many fruitless tries these steps have."""
    count = 0
    for _ in range(steps):
        due = [some[i] for i in back_off.due(some)]
        back_off.note([(r, False) for r in due], len(some), step, seconds)
        count += len(due)
    return count


def test_fruitless_tries_wait_longer_and_longer() -> None:
    back_off, some = BackOff(), requests(1)
    asked = []
    for step in range(1, 250):
        if back_off.due(some):
            asked.append(step)
            back_off.note([(some[0], False)], 1, 1.0, 1.0)
    gaps = [b - a for a, b in pairwise(asked)]
    assert asked[0] == 1
    # Long waits end together with others'.
    assert all(step % TOGETHER == 0 for step in asked[1:])
    assert gaps[1:4] == [16, 32, LONGEST]


def test_short_waits_end_when_they_are_over() -> None:
    back_off, some = BackOff(), requests(2)
    back_off.saved(1, 1.0)  # by a thousand tries' worth: most tries are worth it
    asked = []
    for step in range(1, 2000):
        due = back_off.due(some)
        asked += [step] * (0 in due)
        back_off.note([(some[i], False) for i in due], 2, 0.2, 0.001)
    waits = {b - a for a, b in pairwise(asked)}
    assert waits <= {1, 2, 4, 5, 6}
    assert 6 in waits


def test_cheap_tries_do_not_wait() -> None:
    assert tries(BackOff(), requests(1), 100, 1e-6, 1e-2) == 100


def test_what_is_wasted_stays_below_its_share() -> None:
    # Look-ups for all 64 are worth a tenth of a step.
    back_off, some = BackOff(), requests(64)
    tries(back_off, some, 100, 0.1 / 64, 1.0)
    wasted = tries(back_off, some, 400, 0.1 / 64, 1.0) * 0.1 / 64
    assert 0 < wasted < 0.01 * 400


def test_tries_that_pay_now_and_then_are_made() -> None:
    # One of ten saves as much as a hundred tries take.
    back_off, some = BackOff(), requests(16)
    made = 0
    for step in range(300):
        due = [some[i] for i in back_off.due(some)]
        fruitful = [(r, (step + i) % 10 == 0) for i, r in enumerate(due)]
        count = sum(f for _, f in fruitful)
        if count:
            back_off.saved(count, count * 100 * 0.01)
        back_off.note(fruitful, len(some), 1.0, 0.01)
        made += len(due)
    assert made > 0.8 * 300 * 16


def test_success_ends_the_wait_and_forgetting_too() -> None:
    back_off, some = BackOff(), requests(2)
    tries(back_off, some, 200, 1.0, 1.0)
    while (due := back_off.due(some)) != [0, 1]:
        assert due == []
    back_off.saved(1, 0.001)
    back_off.note([(some[0], True), (some[1], False)], 2, 1.0, 1.0)
    assert back_off.due(some) == [0]
    back_off.forget(some[1])
    assert back_off.due(some) == [0, 1]


def test_who_had_a_draft_is_tried_again_when_drafts_pay() -> None:
    back_off, some = BackOff(), requests(3)
    back_off.saved(1, 1.0)
    for _ in range(100):  # to some[2] nothing occurs
        due = [some[i] for i in back_off.due(some)]
        found = [request for request in due if request is not some[2]]
        back_off.note([(r, False) for r in due], 3, 1.0, 1.0, unworthy=found)
    while len(due := back_off.due(some)) != 3:
        back_off.note([(some[i], False) for i in due], 3, 1.0, 1.0, unworthy=[])
    back_off.note([(some[0], True), (some[2], False)], 3, 1.0, 1.0)
    assert back_off.due(some) == [0, 1]
    # Once they do, who is not worth it waits as ever.
    back_off.note([(some[0], True), (some[1], False)], 3, 1.0, 1.0, unworthy=[some[1]])
    assert back_off.due(some) == [0]


def test_a_dropped_draft_that_was_right_ends_the_wait() -> None:
    back_off, some = BackOff(), requests(2)
    tries(back_off, some, 301, 1.0, 1.0)
    assert back_off.due(some) == []
    back_off.again(some[1])
    assert back_off.due(some) == [1]
    back_off.again(requests(1)[0])  # one that is not known


def test_everybody_is_tried_when_the_load_has_halved() -> None:
    back_off, some = BackOff(), requests(8)
    tries(back_off, some, 300, 1.0, 1.0)
    assert back_off.due(some[:5]) == []
    assert back_off.due(some[:4]) == [0, 1, 2, 3]
