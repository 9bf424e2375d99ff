import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.errors import BadInput
from autotune.workload import (
    Workload,
    WorkloadRow,
    clip_lengths,
    materialise,
    repeat_workload,
    scale_lengths,
    scale_rate,
    slice_workload,
)
from autotune.workload.describe import prefix_share


def make(*rows: tuple[float, int, int], **extra: object) -> Workload:
    return Workload(
        tuple(WorkloadRow(*row, **extra) for row in rows),  # type: ignore[arg-type]
        "test",
        "azure",
    )


TRACE = make((0.0, 100, 10), (1.0, 200, 20), (4.0, 300, 30))


def test_scale_rate_keeps_the_pattern() -> None:
    assert TRACE.rate == pytest.approx(0.5)
    scaled = scale_rate(TRACE, 5.0)
    assert [row.arrival_s for row in scaled.rows] == pytest.approx([0.0, 0.1, 0.4])
    assert scaled.rate == pytest.approx(5.0)
    assert scaled.notes == ("the rate was scaled by 10, from 0.5 to 5 requests/s",)
    assert scale_rate(TRACE, factor=10.0).rows == scaled.rows


def test_scale_rate_of_prompts_without_times_draws_arrivals() -> None:
    prompts = make(*[(0.0, 5, 5)] * 400)
    assert prompts.rate is None
    scaled = scale_rate(prompts, 8.0, seed=3)
    assert scaled.rate == pytest.approx(8.0)
    assert "Poisson arrivals at 8 requests/s (seed 3)" in scaled.notes[0]
    gaps = [b.arrival_s - a.arrival_s for a, b in pairwise(scaled.rows)]
    assert len(set(gaps)) > 390
    assert scale_rate(prompts, 8.0, seed=3) == scaled
    assert scale_rate(prompts, 8.0, seed=4) != scaled
    with pytest.raises(BadInput, match="give a rate"):
        scale_rate(prompts, factor=2.0)


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.inf, math.nan])
def test_bad_factors(wrong: float) -> None:
    with pytest.raises(BadInput, match="above 0 and finite"):
        scale_rate(TRACE, wrong)
    with pytest.raises(BadInput, match="above 0 and finite"):
        scale_rate(TRACE, factor=wrong)
    with pytest.raises(BadInput, match="above 0 and finite"):
        scale_lengths(TRACE, wrong)


def test_scale_rate_needs_exactly_one_wish() -> None:
    with pytest.raises(BadInput, match="either"):
        scale_rate(TRACE)
    with pytest.raises(BadInput, match="either"):
        scale_rate(TRACE, 1.0, factor=1.0)


def test_scale_lengths() -> None:
    scaled = scale_lengths(TRACE, 0.04)
    assert [(row.input_tokens, row.output_tokens) for row in scaled.rows] == [
        (4, 1),
        (8, 1),
        (12, 1),
    ]
    assert scaled.notes == ("input and output lengths were multiplied by 0.04",)
    assert scale_lengths(TRACE, 1.0) is TRACE
    longer = scale_lengths(make((0.0, 3, 2), token_ids=(7, 8, 9)), 2.5)
    assert longer.rows[0].token_ids == (7, 8, 9, 7, 8, 9, 7, 8)
    assert longer.rows[0].input_tokens == 8
    text = scale_lengths(make((0.0, 4, 4), prompt="abcd" * 4), 0.5).rows[0]
    assert (text.prompt, text.input_tokens) == ("abcdabcd", 2)


def test_prefixes_scale_along() -> None:
    rows = [
        (0.0, 1024, 8, (1, 2)),
        (1.0, 1500, 8, (1, 2, 3)),
        (2.0, 1536, 8, (1, 9, 3)),
    ]
    trace = Workload(
        tuple(
            WorkloadRow(t, i, o, prefix_ids=ids, prefix_block_tokens=512) for t, i, o, ids in rows
        ),
        "test",
        "mooncake",
    )
    scaled = scale_lengths(trace, 0.125)
    assert [row.prefix_block_tokens for row in scaled.rows] == [64] * 3
    assert prefix_share(scaled) == pytest.approx(prefix_share(trace), abs=0.01)
    whole = materialise(trace, 1000, 0)
    small = materialise(scaled, 1000, 0)
    for full, requests in ((512, whole), (64, small)):
        a, b, c = (request.token_ids for request in requests)
        assert a[: 2 * full] == b[: 2 * full]
        assert a[:full] == c[:full]
        assert a[full : 2 * full] != c[full : 2 * full]


@given(
    st.lists(
        st.tuples(st.floats(0, 100), st.integers(1, 10**5), st.integers(1, 10**5)),
        min_size=1,
        max_size=20,
    ),
    st.integers(2, 4096),
)
@settings(deadline=None)
def test_clip_lengths(rows: list[tuple[float, int, int]], limit: int) -> None:
    workload = make(*rows)
    clipped = clip_lengths(workload, limit)
    over = 0
    for before, after in zip(workload.rows, clipped.rows, strict=True):
        if before.input_tokens + before.output_tokens <= limit:
            assert after == before
            continue
        over += 1
        assert after.input_tokens >= 1
        assert after.output_tokens >= 1
        assert after.input_tokens + after.output_tokens == limit
        exact = limit * before.output_tokens / (before.input_tokens + before.output_tokens)
        assert abs(after.output_tokens - exact) <= 1
    assert bool(clipped.notes) == (over > 0)
    if over:
        assert f"{over} of {len(rows)} requests were shortened" in clipped.notes[0]


def test_clip_keeps_the_beginning_of_the_prompt() -> None:
    row = make((0.0, 6, 4), token_ids=(1, 2, 3, 4, 5, 6))
    (clipped,) = clip_lengths(row, 5).rows
    assert (clipped.token_ids, clipped.output_tokens) == ((1, 2, 3), 2)
    with pytest.raises(BadInput, match="at least 2 tokens"):
        clip_lengths(row, 1)


def test_slice() -> None:
    part = slice_workload(TRACE, start_s=0.5)
    assert [(row.arrival_s, row.input_tokens) for row in part.rows] == [(0.0, 200), (3.0, 300)]
    assert part.notes == ("2 of 3 requests were taken, from 1 s to 4 s",)
    assert [row.input_tokens for row in slice_workload(TRACE, duration_s=4.0).rows] == [100, 200]
    assert len(slice_workload(TRACE, max_requests=1).rows) == 1
    assert slice_workload(TRACE) is TRACE
    with pytest.raises(BadInput, match="the workload lasts 4 s"):
        slice_workload(TRACE, start_s=10)
    for options in ({"start_s": -1.0}, {"duration_s": 0.0}, {"max_requests": 0}):
        with pytest.raises(BadInput, match="the slice"):
            slice_workload(TRACE, **options)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="the slice"):
        slice_workload(TRACE, duration_s=math.nan)


def test_repeat_does_not_make_prefix_hits_of_its_own() -> None:
    trace = Workload(
        tuple(
            WorkloadRow(t, 20, 1, prefix_ids=ids, prefix_block_tokens=10, session_id="s")
            for t, ids in ((0.0, (2, -1)), (2.0, (-1, 2)))
        ),
        "test",
        "mooncake",
    )
    twice = repeat_workload(trace, 7.0)
    assert [row.arrival_s for row in twice.rows] == [0.0, 2.0, 4.0, 6.0]
    assert twice.rate == pytest.approx(trace.rate)
    assert prefix_share(twice) == prefix_share(trace)
    assert [row.session_id for row in twice.rows] == ["s", "s", "s.1", "s.1"]
    assert twice.notes == ("the workload was played 2 times in a row",)
    assert repeat_workload(trace, 3.0) is trace
    prompts = make((0.0, 1, 1), (1.0, 1, 1), prompt="x")
    assert "will hit the prefix cache" in repeat_workload(prompts, 9.0).notes[0]
    with pytest.raises(BadInput, match="give a rate"):
        repeat_workload(make((0.0, 1, 1)), 9.0)
