"""Drafts by prompt lookup, against a search written out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.profiling.evidence import LoadEvidence
from autotune.profiling.schema import Speculation
from autotune.profiling.speculation_dry_run import DRAFT_TOKENS, lookups, replayed, speculation
from autotune.profiling.step_columns import StepColumns
from engine.config import EngineConfig
from engine.speculate.ngram import Lookup
from tests.autotune.profiling.loads import request

LOOKUP = Lookup(shortest=2, longest=4)


def draft(context: Sequence[int], longest: int, window: int = 0) -> list[int]:
    """What follows the latest earlier occurrence of the longest n-gram at the context's end.

    Where the context ends first, the draft goes on with its own beginning.
    """
    begin = max(0, len(context) - 1 - window) if window else 0
    for n in (4, 3, 2):
        end = list(context[-n:])
        for start in range(len(context) - n - 1, begin - 1, -1):
            if list(context[start : start + n]) == end:
                found = list(context[start + n :])
                return [found[i % len(found)] for i in range(longest)]
    return []


def dry_run(requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Speculation:
    return replayed(requests, LOOKUP).to_profile()


def section(evidence: LoadEvidence, **knobs: Any) -> tuple[Speculation | None, list[str]]:
    """Of a load without steps, so that nothing is forecast."""
    config = EngineConfig(model="test", **knobs)
    return speculation(evidence, config, StepColumns.of([]), None, None)


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
    assert found.num_requests == len(requests)
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
    found = lookups(tokens, len(prompt) + 1, longest, LOOKUP)
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
    # Then all the others come nine at a time.
    assert found.hit_share == pytest.approx(6 / 7)
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
    found, partial = section(LoadEvidence(answered, [], prompts, True), prompt_lookup_min=1)
    assert found is not None
    assert found.num_requests == 20
    assert found.synthetic_prompts
    assert (found.min_ngram, found.max_ngram) == (1, 4)
    assert found.loads == []
    assert not partial
    found, partial = section(LoadEvidence(answered[:19], [], prompts))
    assert found is None
    assert partial == ["the dry run of drafts needs at least 20 requests; has 19"]
    found, partial = section(LoadEvidence(answered, []))
    assert found is None
    assert "hold no tokens" in partial[0]


def test_of_very_long_traffic_every_nth_request_is_looked_at() -> None:
    answer = tuple(range(500))
    many = [request(str(i), output_token_ids=answer, token_times=(1.0, 2.0)) for i in range(800)]
    prompts = {str(i): (1, 2, 3) for i in range(800)}
    found, _ = section(LoadEvidence(many, [], prompts))
    assert found is not None
    assert 60 <= found.num_requests <= 100


def test_what_the_engine_is_told_to_look_up_is_looked_up() -> None:
    # "1 2" lies far back, "2" alone nearer by.
    tokens = [1, 2, 3, 4, *range(10, 40), 2, 5, 6, *range(40, 60), 1, 2, 9]
    at = len(tokens) - 1
    for shortest, window, wanted in ((2, 0, 3), (2, 20, None), (1, 30, 5), (1, 0, 3)):
        config = EngineConfig(model="test", prompt_lookup_min=shortest, prompt_lookup_window=window)
        for right in (3, 5):
            truth = [*tokens[:at], right]
            ((length, agreed),) = lookups(truth, at, 1, Lookup.of(config))
            assert (length, agreed) == (wanted is not None, right == wanted)


def test_hits_in_a_row_are_counted_along_the_steps_that_are_taken() -> None:
    # The first answer finds drafts from its second step on, all the way; the other never does.
    found = dry_run([(range(60), range(10, 50)), (range(60), range(100, 140))])
    one = dry_run([(range(60), range(10, 50))])
    assert one.hit_run == found.hit_run
    # One step without a draft, then 38 tokens in steps of 9.
    assert found.hit_run == 5
    assert dry_run([(range(60), range(100, 140))]).hit_run is None


def test_acceptance_has_intervals_that_know_of_runs() -> None:
    rng = np.random.default_rng(3)

    def answers(copies: Sequence[bool]) -> list[tuple[range, list[int]]]:
        """Some answers copy their prompt, the others go round with an error at every third."""
        wrong = [i % 3 or int(rng.integers(1000, 2000)) for i in range(40)]
        return [(range(60), list(range(10, 50)) if copy else wrong) for copy in copies]

    runs = replayed(answers([i % 100 < 50 for i in range(200)]), LOOKUP).positions()[2].share
    mixed = replayed(answers([i % 2 == 0 for i in range(200)]), LOOKUP).positions()[2].share
    assert runs is not None
    assert mixed is not None
    assert runs.value == pytest.approx(mixed.value)
    assert runs.low < runs.value < runs.high
    # Halves of the load that differ tell less than requests that take turns.
    assert runs.high - runs.low > 2 * (mixed.high - mixed.low)
