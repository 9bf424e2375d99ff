"""What points are worth, against sums taken sample by sample."""

from __future__ import annotations

import numpy as np
import pytest

from autotune.search.acquisition import Reached, Sampled, choose, expected_improvements


def sampled(seed: int, points: int, samples: int = 50) -> Sampled:
    rng = np.random.default_rng(seed)
    missed = np.maximum(0.0, rng.normal(0.0, 1.0, (points, samples)))
    return Sampled(rng.normal(10.0, 3.0, (points, samples)), missed <= 0, missed)


@pytest.mark.parametrize("seed", range(5))
def test_worth_is_the_mean_gain_over_the_best_where_the_limits_are_met(seed: int) -> None:
    candidates, measured = sampled(seed, 6), sampled(100 + seed, 2)
    worth = expected_improvements(candidates, Reached.by(measured, 0.5))
    low, high = candidates.value.min(), candidates.value.max()
    for point in range(6):
        gains = []
        for sample in range(50):
            best = max(low, *measured.value[:, sample])
            gain = candidates.value[point, sample] - best
            gains.append(max(0.0, gain) if candidates.met[point, sample] else 0.0)
        expected = sum(gains) / 50 / (high - low)
        assert worth[point] == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_where_nothing_meets_the_limits_the_nearest_to_them_is_worth_most() -> None:
    value = np.full((3, 4), 5.0)
    missed = np.array([[0.9] * 4, [0.2] * 4, [1.5] * 4])
    candidates = Sampled(value, missed <= 0, missed)
    none = Sampled(np.empty((0, 4)), np.empty((0, 4), bool), np.empty((0, 4)))
    worth = expected_improvements(candidates, Reached.by(none, 1.0))
    assert worth == pytest.approx([0.1, 0.8, 0.0])


def test_what_is_like_a_chosen_point_is_not_chosen_with_it() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(10.0, 2.0, 400), rng.normal(9.5, 2.0, 400)
    value = np.stack([one, one - 0.01, other])
    met = np.ones((3, 400), bool)
    candidates = Sampled(value, met, np.zeros((3, 400)))
    none = Sampled(np.empty((0, 400)), np.empty((0, 400), bool), np.empty((0, 400)))
    chosen = [index for index, _ in choose(candidates, Reached.by(none, 1.0), 2)]
    assert chosen == [0, 2]


def test_a_point_that_never_meets_the_limits_is_worth_nothing_beside_one_that_did() -> None:
    measured = Sampled(np.full((1, 8), 1.0), np.ones((1, 8), bool), np.zeros((1, 8)))
    fast = Sampled(np.full((1, 8), 100.0), np.zeros((1, 8), bool), np.ones((1, 8)))
    assert expected_improvements(fast, Reached.by(measured, 0.0)).tolist() == [0.0]


def test_more_are_asked_for_than_there_are() -> None:
    candidates = sampled(3, 2)
    chosen = choose(candidates, Reached.by(sampled(4, 1), 0.1), 5)
    assert sorted(index for index, _ in chosen) == [0, 1]
