"""Tokens counted as they come are those counted anew."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from engine.request import Request, SamplingParams
from engine.sampled_row import DraftedRow

TOKENS = st.lists(st.integers(0, 40), max_size=30)


def counted(row: Request | DraftedRow) -> dict[int, int]:
    tokens, counts = row.counted_tokens()
    assert len(tokens) == len(counts) == len(set(tokens.tolist()))
    return dict(zip(tokens.tolist(), map(int, counts), strict=True))


def expected(row: Request | DraftedRow) -> dict[int, int]:
    output = Counter(row.output_token_ids)
    return {token: output[token] for token in row.token_ids}


@given(
    prompt=st.lists(st.integers(0, 40), min_size=1, max_size=60),
    portions=st.lists(TOKENS, max_size=4),
    drafted=st.lists(st.integers(0, 60), min_size=1, max_size=8),
    elsewhere=TOKENS,
)
def test_counts_follow_the_output(
    prompt: list[int], portions: list[list[int]], drafted: list[int], elsewhere: list[int]
) -> None:
    request = Request("a", prompt, SamplingParams(), 0.0)
    for portion in [[], *portions]:
        request.token_ids += portion
        row = DraftedRow(request, drafted)
        assert counted(row) == expected(row)
        assert counted(request) == expected(request)
        copy = request.copied()
        copy.token_ids += elsewhere
        assert counted(copy) == expected(copy)
    assert counted(request) == expected(request)
