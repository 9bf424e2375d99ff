"""Intervals against scipy's, and whether they cover what they should."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from engine.quantize.intervals import bootstrap_interval, mean_interval


def test_mean_interval_is_the_paired_one_of_scipy() -> None:
    generator = np.random.default_rng(3)
    first, second = generator.normal(size=(2, 12))
    value, low, high = mean_interval(first - second)
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert value == pytest.approx(float((first - second).mean()))
    assert (low, high) == pytest.approx((float(expected.low), float(expected.high)))


def test_one_window_tells_nothing_of_the_spread() -> None:
    assert mean_interval(np.array([0.25])) == (0.25, -math.inf, math.inf)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_not_finite_has_no_interval(broken: float) -> None:
    windows = np.array([[0.1, 0.2], [0.3, broken]])
    for found in (
        mean_interval(windows.mean(axis=1)),
        bootstrap_interval(windows, lambda rows: rows.mean(axis=1), 0),
    ):
        assert not any(math.isfinite(value) for value in found)


def test_bootstrap_takes_windows_for_what_is_independent() -> None:
    """Positions of a window are alike, so that few windows are few observations.

    An interval over positions as if they were independent would hold the truth far too seldom.
    """
    generator = np.random.default_rng(8)
    covered, widths = 0, []
    for seed in range(40):
        levels = generator.normal(size=(25, 1))
        windows = levels + 0.1 * generator.normal(size=(25, 50))
        value, low, high = bootstrap_interval(windows, lambda rows: rows.mean(axis=1), seed)
        assert low < value < high
        covered += low < 0 < high
        widths.append(high - low)
    assert covered >= 32  # 95% of 40 is 38; below 32 has a chance under one in a thousand
    # 2 x 1.96 standard errors of 25 independent levels, not of 1250 positions.
    assert float(np.mean(widths)) == pytest.approx(2 * 1.96 / math.sqrt(25), rel=0.15)


def test_bootstrap_of_a_tail_follows_the_windows() -> None:
    windows = np.zeros((10, 100))
    windows[0] = 1.0  # one window in ten has all of the tail
    value, low, high = bootstrap_interval(windows, lambda rows: np.quantile(rows, 0.99, axis=1), 0)
    assert (value, low, high) == (1.0, 0.0, 1.0)
