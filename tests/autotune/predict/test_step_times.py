"""Many steps added up at once end when they end one after another."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.predict.step_times import DecodeLine


@st.composite
def lines(draw: st.DrawFn) -> DecodeLine:
    tokens = sorted(draw(st.sets(st.integers(0, 3000), min_size=1, max_size=4)))
    first = draw(st.floats(1e-4, 1e-2))
    rises = [draw(st.sampled_from([0.0, 1e-4, 3e-3])) for _ in tokens]
    return DecodeLine(tuple(map(float, tokens)), tuple(first + np.cumsum(rises)))


@given(
    line=lines(),
    start=st.floats(0, 1000),
    tokens=st.integers(1, 4000),
    each=st.integers(1, 64),
    steps=st.integers(1, 300),
    within=st.one_of(st.just(math.inf), st.floats(0, 2)),
    scale=st.sampled_from([1.0, 0.7, 3.0]),
    gap=st.sampled_from([0.0, 1e-4]),
)
def test_steps_end_as_they_do_one_by_one(
    line: DecodeLine,
    start: float,
    tokens: int,
    each: int,
    steps: int,
    within: float,
    scale: float,
    gap: float,
) -> None:
    until = start + within
    ends = line.ends(start, tokens, each, steps, until=until, scale=scale, gap=gap)
    now, expected = start, []
    for step in range(steps):
        if step and now >= until + 1e-9:
            break
        now += scale * line.at(tokens + step * each) + gap
        expected.append(now)
    # Whether a step that begins within rounding of `until` is taken is left open.
    assert len(ends) <= len(expected)
    assert len(ends) == steps or ends[-1] >= until - 1e-9
    assert ends == pytest.approx(expected[: len(ends)], abs=1e-9)


def test_between_its_points_it_is_straight_and_beyond_them_goes_on() -> None:
    line = DecodeLine((100.0, 200.0, 400.0), (1.0, 2.0, 2.5))
    assert [line.at(t) for t in (0, 100, 150, 200, 300, 400, 600)] == [
        *(0.0, 1.0, 1.5, 2.0, 2.25, 2.5, 3.0)
    ]
