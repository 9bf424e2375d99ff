from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from autotune.search.gain import paired_gain


def test_ratio_interval_equals_the_t_interval_of_the_logarithms() -> None:
    default, candidate = [10.0, 12.0, 9.0, 11.0], [13.0, 15.5, 11.0, 15.0]
    logs = np.log(np.array(candidate) / np.array(default))
    low, high = stats.t.interval(0.95, 3, loc=logs.mean(), scale=stats.sem(logs))
    gain = paired_gain(default, candidate, maximise=True)
    assert gain is not None
    assert gain.unit == "ratio"
    assert gain.value == pytest.approx(math.exp(logs.mean()))
    assert (gain.low, gain.high) == pytest.approx((math.exp(low), math.exp(high)))
    assert gain.proven


def test_less_is_better_turns_the_ratio_round() -> None:
    up = paired_gain([2.0, 2.2, 1.9], [1.0, 1.1, 1.0], maximise=False)
    down = paired_gain([1.0, 1.1, 1.0], [2.0, 2.2, 1.9], maximise=True)
    assert up == down


def test_zero_baseline_gives_a_difference() -> None:
    gain = paired_gain([0.0, 0.0, 0.1], [2.0, 2.1, 1.9], maximise=True)
    assert gain is not None
    assert gain.unit == "difference"
    assert gain.value == pytest.approx((2.0 + 2.1 + 1.8) / 3)
    assert gain.low < gain.value < gain.high


def test_more_comparisons_widen_the_interval() -> None:
    values = ([1.0, 1.1, 0.9, 1.0], [1.2, 1.1, 1.2, 1.3])
    one = paired_gain(*values, maximise=True, comparisons=1)
    three = paired_gain(*values, maximise=True, comparisons=3)
    assert one is not None
    assert three is not None
    assert three.low < one.low < one.high < three.high


def test_one_round_gives_no_interval() -> None:
    assert paired_gain([1.0], [2.0], maximise=True) is None


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(2000):
        shared = rng.lognormal(0, 0.5, 4)
        default = shared * rng.lognormal(0, 0.1, 4)
        candidate = 1.3 * shared * rng.lognormal(0, 0.1, 4)
        gain = paired_gain(list(default), list(candidate), maximise=True)
        assert gain is not None
        covered += gain.low <= 1.3 <= gain.high
    # Binomial(2000, 0.95): four standard deviations are 39.
    assert abs(covered - 1900) < 39


def test_scattered_rounds_do_not_overflow() -> None:
    gain = paired_gain([1e-300, 1e300], [1e300, 1e-300], maximise=True)
    assert gain is not None
    assert math.isfinite(gain.high)
    assert not gain.proven
