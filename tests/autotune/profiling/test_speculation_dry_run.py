"""Drafts by prompt lookup, against a search written out."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.profiling.evidence import LoadEvidence
from autotune.profiling.speculation_dry_run import DRAFT_TOKENS, dry_run, lookups, speculation
from tests.autotune.profiling.loads import request


def draft(context: Sequence[int], longest: int) -> list[int]:
    """What follows the latest earlier occurrence of the longest n-gram at the context's end."""
    for n in (4, 3, 2):
        if len(context) < n:
            continue
        end = list(context[-n:])
        for start in range(len(context) - n - 1, -1, -1):
            if list(context[start : start + n]) == end:
                return list(context[start + n :][:longest])
    return []


def decode(prompt: Sequence[int], output: Sequence[int], k: int) -> tuple[int, int]:
    """Tokens after the first and the steps they take, drafting k a step."""
    tokens, at, steps = [*prompt, *output], len(prompt) + 1, 0
    while at < len(tokens):
        proposed = draft(tokens[:at], k)
        right = 0
        while (
            right < len(proposed)
            and at + right < len(tokens)
            and proposed[right] == tokens[at + right]
        ):
            right += 1
        at += right + 1
        steps += 1
    return len(output) - 1, steps


texts = st.lists(st.integers(0, 3), min_size=1, max_size=30)


@given(
    st.lists(
        st.tuples(texts, st.lists(st.integers(0, 3), min_size=2, max_size=40)),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=150, deadline=None)
def test_the_dry_run_decodes_as_a_search_written_out(
    requests: list[tuple[list[int], list[int]]],
) -> None:
    found = dry_run(requests)
    for k in DRAFT_TOKENS:
        runs = [decode(prompt, output, k) for prompt, output in requests]
        expected = sum(tokens for tokens, _ in runs) / sum(steps for _, steps in runs)
        assert found.tokens_per_step[k] == pytest.approx(expected), k


@given(texts, st.lists(st.integers(0, 3), min_size=1, max_size=30), st.sampled_from([1, 3, 8]))
@settings(max_examples=150, deadline=None)
def test_each_positions_draft_is_that_of_a_search_written_out(
    prompt: list[int], output: list[int], longest: int
) -> None:
    tokens = [*prompt, *output]
    found = lookups(tokens, len(prompt) + 1, longest)
    assert len(found) == len(output) - 1
    for offset, (length, right) in enumerate(found):
        at = len(prompt) + 1 + offset
        proposed = draft(tokens[:at], longest)
        assert length == len(proposed)
        agreeing = 0
        for mine, real in zip(proposed, tokens[at:], strict=False):
            if mine != real:
                break
            agreeing += 1
        assert right == agreeing


def test_an_answer_that_repeats_its_prompt_is_drafted_whole() -> None:
    prompt = list(range(100))
    found = dry_run([(prompt, prompt[10:60])])
    # The second and third token must be there before they can be looked for.
    assert found.hit_share == pytest.approx(48 / 49)
    assert found.tokens_per_step[8] > 6
    assert found.tokens_per_step[1] == pytest.approx(49 / 25)
    first = found.positions[0]
    assert first.position == 1
    assert first.accepted == first.drafted


def test_positions_count_drafts_that_were_long_enough_and_right_so_far() -> None:
    # "1 2 3 4" is drafted after the second "1 2"; 3 is right and 4 is not.
    found = dry_run([([1, 2, 3, 4, 5, 6, 7, 8, 9, 1], [2, 3, 9, 9])])
    assert [(p.drafted, p.accepted) for p in found.positions[:3]] == [(1, 1), (1, 0), (1, 0)]
    assert found.tokens_per_step[1] == pytest.approx(3 / 2)


def test_random_tokens_are_not_drafted() -> None:
    found = dry_run([(list(range(50)), list(range(50, 90)))])
    assert found.hit_share == 0.0
    assert set(found.tokens_per_step.values()) == {1.0}
    assert all(p.drafted == 0 for p in found.positions)


def test_the_dry_run_needs_tokens_and_enough_requests() -> None:
    answered = [request(str(i), output_token_ids=(1, 2), token_times=(1.0, 2.0)) for i in range(20)]
    prompts = {str(i): (1, 2, 3) for i in range(20)}
    found, partial = speculation(LoadEvidence(answered, [], prompts, True))
    assert found is not None
    assert found.num_requests == 20
    assert found.synthetic_prompts
    assert not partial
    found, partial = speculation(LoadEvidence(answered[:19], [], prompts))
    assert found is None
    assert partial == ["the dry run of drafts needs at least 20 requests; has 19"]
    found, partial = speculation(LoadEvidence(answered, []))
    assert found is None
    assert "hold no tokens" in partial[0]


def test_of_very_long_traffic_every_nth_request_is_looked_at() -> None:
    answer = tuple(range(500))
    many = [request(str(i), output_token_ids=answer, token_times=(1.0, 2.0)) for i in range(2000)]
    prompts = {str(i): (1, 2, 3) for i in range(2000)}
    found, _ = speculation(LoadEvidence(many, [], prompts))
    assert found is not None
    assert 20 <= found.num_requests <= 400
