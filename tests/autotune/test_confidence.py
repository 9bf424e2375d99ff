"""Intervals in closed form, against other ways to the same numbers."""

import math

import pytest
from scipy import stats

from autotune.confidence import student_95, wilson_interval


def test_wilson_interval() -> None:
    # 8 of 10 by the closed form, computed elsewhere; and the rule of three at the edge.
    low, high = wilson_interval(8, 10)
    assert low == pytest.approx(0.49016, abs=1e-5)
    assert high == pytest.approx(0.94332, abs=1e-5)
    assert wilson_interval(0, 0) == (None, None)
    for successes, trials in ((0, 50), (50, 50), (17, 40)):
        low, high = wilson_interval(successes, trials)
        assert low is not None
        assert high is not None
        assert 0 <= low <= successes / trials <= high <= 1
        assert high - low > 0.05
        # Wilson's bounds are where the score test is just at its critical value.
        for bound in (low, high):
            if 0 < bound < 1:
                error = math.sqrt(bound * (1 - bound) / trials)
                assert abs(successes / trials - bound) / error == pytest.approx(1.95996, abs=1e-4)


def test_trials_that_count_as_fewer_need_not_be_whole() -> None:
    # Between those of the whole numbers around it.
    wide, between, narrow = (wilson_interval(0.3 * n, n) for n in (40, 40.5, 41))
    assert wide[0] < between[0] < narrow[0] < 0.3 < narrow[1] < between[1] < wide[1]  # type: ignore[operator]


@pytest.mark.parametrize("freedom", [1, 4, 29, 1000])
def test_students_quantile_holds_its_share(freedom: int) -> None:
    bound = student_95(freedom)
    assert stats.t.cdf(bound, freedom) - stats.t.cdf(-bound, freedom) == pytest.approx(0.95)
