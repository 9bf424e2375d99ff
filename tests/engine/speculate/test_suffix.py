"""Suffix reuse against a plain search over all texts, on fresh random ones."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from engine.config import EngineConfig
from engine.request import Request, RequestState, SamplingParams
from engine.speculate.recent_outputs import END, RecentOutputs
from engine.speculate.suffix import SuffixProposer


def config(shortest: int = 2, longest: int = 4, window: int = 0) -> EngineConfig:
    return EngineConfig(
        prompt_lookup_min=shortest, prompt_lookup_max=longest, prompt_lookup_window=window
    )


def request(prompt: list[int], output: list[int]) -> Request:
    made = Request("r", list(prompt), SamplingParams(), 0.0)
    made.token_ids += output
    return made


def finish(proposer: SuffixProposer, output: list[int], prompt: tuple[int, ...] = (0,)) -> None:
    gone = request(list(prompt), output)
    gone.state = RequestState.FINISHED
    proposer.forget(gone)


def drafted(proposer: SuffixProposer, asked: Request, limit: int) -> list[int] | None:
    (draft,) = proposer.propose([asked], [limit])
    return None if draft is None else list(draft.token_ids)


def test_answers_of_others_are_drafted_once_they_left() -> None:
    proposer = SuffixProposer(config())
    asked = request([90, 91], [1, 2])
    assert drafted(proposer, asked, 3) is None
    running = request([80], [1, 2, 3, 4, 5])
    proposer.propose([running], [3])
    proposer.forget(running)  # preempted
    assert drafted(proposer, asked, 3) is None
    finish(proposer, [1, 2, 3, 4, 5], prompt=(1, 2, 77, 78))
    assert drafted(proposer, asked, 2) == [3, 4]
    assert drafted(proposer, asked, 9) == [3, 4, 5]  # not beyond that answer's end
    assert drafted(proposer, asked, 0) is None
    # Prompts of others are not drafted from, nor the border between two answers.
    assert drafted(proposer, request([9], [77, 78]), 3) is None
    finish(proposer, [6, 7])
    assert drafted(proposer, request([9], [5, 6]), 3) is None
    assert drafted(proposer, request([9], [6, 7]), 3) is None


def test_the_longest_ending_wins_and_the_own_text_among_equals() -> None:
    proposer = SuffixProposer(config())
    finish(proposer, [5, 1, 2, 30, 31])
    assert drafted(proposer, request([1, 2, 40, 41], [9, 1, 2]), 2) == [40, 41]
    assert drafted(proposer, request([1, 2, 40, 41], [5, 1, 2]), 2) == [30, 31]
    # More than `prompt_lookup_max` tokens are not compared.
    proposer.reconfigure(config(longest=2))
    assert drafted(proposer, request([1, 2, 40, 41], [5, 1, 2]), 2) == [40, 41]
    proposer.reconfigure(config(shortest=4))
    assert drafted(proposer, request([1, 2, 40, 41], [5, 1, 2]), 2) is None


def test_the_majority_is_followed() -> None:
    proposer = SuffixProposer(config())
    for output in ([1, 2, 3, 4, 5], [1, 2, 3, 8, 8], [1, 2, 7, 7, 7], [1, 2, 3, 4, 6]):
        finish(proposer, output)
    (draft,) = proposer.propose([request([99], [1, 2])], [3])
    assert draft is not None
    # Of the two that go on with 4 the later one is followed.
    assert draft.token_ids == [3, 4, 6]
    first = 3 / (4 + 1.0)
    second = first * 2 / (3 + 2 / 3)
    assert draft.chances == pytest.approx([first, second, second * 1 / (2 + 2 / 4)])


def test_own_loops_go_on() -> None:
    proposer = SuffixProposer(config())
    assert drafted(proposer, request([9, 1, 2, 3, 1, 2], [3]), 7) == [1, 2, 3, 1, 2, 3, 1]
    assert drafted(proposer, request([9, 6, 6], [6]), 5) == [6] * 5


def plain_draft(
    own: list[int], others: list[list[int]], shortest: int, longest: int, limit: int
) -> tuple[int, list[list[int]]]:
    """The longest known ending's length, and what followed each of its occurrences."""
    for length in range(min(longest, len(own)), 0, -1):
        ending = own[-length:]
        if length >= shortest:
            ends = [e for e in range(length, len(own)) if own[e - length : e] == ending]
            if ends:
                grown = [[own[e + i % (len(own) - e)] for i in range(limit)] for e in ends[-16:]]
                return length, grown
        if length >= max(2, shortest):
            found = [
                [*text[e : e + limit], *[END] * (e + limit - len(text))]
                for text in others
                for e in range(length, len(text) + 1)
                if text[e - length : e] == ending
            ]
            if found:
                return length, found[-16:]
    return 0, []


def test_drafts_are_those_of_a_plain_search() -> None:
    seed = random.randrange(1 << 30)
    rng = random.Random(seed)
    found = 0
    for _ in range(400):
        words = rng.choice([2, 4, 9])
        texts = [[rng.randrange(words) for _ in range(rng.randrange(18))] for _ in range(6)]
        shortest = rng.randrange(1, 4)
        longest = shortest + rng.randrange(5)
        proposer = SuffixProposer(config(shortest, longest))
        for text in texts:
            finish(proposer, text)
        own = [rng.randrange(words) for _ in range(rng.randrange(1, 12))]
        if rng.random() < 0.3:
            own += [words, *texts[0][:4]]
        texts = [text for text in texts if len(text) >= 2]
        length, followed = plain_draft(own, texts, shortest, longest, limit=5)
        (draft,) = proposer.propose([request(own[:1], own[1:])], [5])
        say = (seed, own, texts, shortest, longest)
        followed = [row for row in followed if row[0] != END]
        if draft is None:
            assert not followed, say
            continue
        found += 1
        chance = 1.0
        assert len(draft.token_ids) <= 5
        for i, token in enumerate(draft.token_ids):
            votes = Counter(row[i] for row in followed)
            assert votes[token] == max(votes.values(), default=-1), say
            chance *= votes[token] / (len(followed) + 2 / (length + i))
            assert draft.chances is not None
            assert draft.chances[i] == pytest.approx(chance), say
            followed = [
                row for row in followed if row[i] == token and END not in row[i + 1 : i + 2]
            ]
        assert len(draft) == 5 or not followed, say
    assert found > 150


def test_what_is_remembered_is_bounded() -> None:
    outputs = RecentOutputs(100)
    rng = random.Random(2)
    texts = [[rng.randrange(5) for _ in range(rng.randrange(1, 40))] for _ in range(80)]
    texts.append([rng.randrange(5) for _ in range(300)])
    for count, text in enumerate(texts):
        outputs.add(text)
        assert len(outputs) <= 200
        if count > 20:
            assert len(outputs) >= 60
        kept = []
        for pair in [(a, b) for a in range(5) for b in range(5)]:
            for array, ends in outputs.occurrences(np.array(pair, dtype=np.int32)):
                assert ends.tolist() == sorted(ends.tolist())
                assert all((array[e - 1], array[e]) == pair for e in ends)
                kept.append(len(ends))
        assert sum(kept) > 0 or len(text) < 2
    # Of the long one the end is there, and nothing that is old.
    array, ends = next(outputs.occurrences(np.array(texts[-1][-2:], dtype=np.int32)))
    assert array[int(ends[-1]) - 1 : int(ends[-1]) + 2].tolist() == [*texts[-1][-2:], END]
    assert list(outputs.occurrences(np.array([3], dtype=np.int32))) == []


def test_what_was_cleared_is_found_no_more() -> None:
    proposer = SuffixProposer(EngineConfig(speculative_method="suffix"))
    answered, asking = (
        Request(name, tokens, SamplingParams(), 0.0)
        for name, tokens in (("a", [1, 2, 3, 4, 5, 6]), ("b", [9, 2, 3, 4]))
    )
    answered.num_prompt_tokens = 1
    proposer.propose([answered], [4])
    answered.state = RequestState.FINISHED
    proposer.forget(answered)
    (draft,) = proposer.propose([asking], [2])
    assert draft is not None
    assert list(draft.token_ids) == [5, 6]
    proposer.clear()
    assert proposer.propose([asking], [2]) == [None]
