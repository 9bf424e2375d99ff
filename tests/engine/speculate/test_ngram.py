"""Prompt lookup against a plain search, on fresh random texts."""

from __future__ import annotations

import random

import numpy as np
import pytest

from engine.config import EngineConfig
from engine.request import Request, SamplingParams
from engine.speculate import ngram
from engine.speculate.ngram import Lookup, NgramProposer, continuation, latest_match
from engine.speculate.token_buffer import TokenBuffer


def plain_search(tokens: list[int], lookup: Lookup) -> int | None:
    """The definition: the longest ending first, its latest earlier occurrence in the window."""
    count = len(tokens)
    begin = max(0, count - 1 - lookup.window) if lookup.window else 0
    for length in range(min(lookup.longest, count), lookup.shortest - 1, -1):
        ending = tokens[count - length :]
        for end in range(count - 1, begin + length - 1, -1):
            if tokens[end - length : end] == ending:
                return end
    return None


@pytest.mark.parametrize("first_stretch", [1, 3, 1024])
def test_finds_what_a_plain_search_finds(
    first_stretch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ngram, "_FIRST_STRETCH", first_stretch)
    seed = random.randrange(1 << 30)
    rng = random.Random(seed)
    found = 0
    for _ in range(1500):
        words = rng.choice([1, 2, 3, 8, 40])
        tokens = [rng.randrange(words) for _ in range(rng.randrange(70))]
        shortest = rng.randrange(1, 5)
        lookup = Lookup(shortest, shortest + rng.randrange(4), rng.choice([0, 0, 1, 2, 7, 30, 99]))
        expected = plain_search(tokens, lookup)
        assert latest_match(np.array(tokens, dtype=np.int32), lookup) == expected, (
            seed,
            tokens,
            lookup,
        )
        found += expected is not None
    assert 300 < found < 1400


def config(shortest: int = 2, longest: int = 4, window: int = 0) -> EngineConfig:
    return EngineConfig(
        prompt_lookup_min=shortest, prompt_lookup_max=longest, prompt_lookup_window=window
    )


def request(tokens: list[int]) -> Request:
    return Request("r", tokens, SamplingParams(), 0.0)


def drafted(proposer: NgramProposer, asked: Request, limit: int) -> list[int] | None:
    (draft,) = proposer.propose([asked], [limit])
    if draft is None:
        return None
    assert draft.parents is None
    assert draft.probabilities is None
    return list(draft.token_ids)


def test_drafts_what_followed_the_longest_ending() -> None:
    proposer = NgramProposer(config())
    tokens = [5, 1, 2, 3, 40, 41, 42, 9, 2, 3, 50, 51, 1, 2, 3]
    assert drafted(proposer, request(tokens), 4) == [40, 41, 42, 9]
    assert drafted(proposer, request(tokens), 1) == [40]
    assert drafted(proposer, request(tokens), 0) is None
    # Of equally long ones the latest.
    assert drafted(proposer, request([1, 2, 7, 1, 2, 8, 1, 2]), 1) == [8]
    assert drafted(proposer, request([1, 2, 3]), 4) is None


def test_a_loop_is_drafted_as_a_loop() -> None:
    proposer = NgramProposer(config())
    assert drafted(proposer, request([9, 1, 2, 3, 1, 2, 3]), 7) == [1, 2, 3, 1, 2, 3, 1]
    assert drafted(proposer, request([9, 6, 6, 6]), 5) == [6] * 5


def test_a_window_and_changed_knobs() -> None:
    asked = request([1, 2, 30, 4, 5, 6, 7, 1, 2])
    proposer = NgramProposer(config(window=3))
    assert drafted(proposer, asked, 2) is None
    proposer.reconfigure(config(window=8))
    assert drafted(proposer, asked, 2) == [30, 4]
    proposer.reconfigure(config(shortest=3, window=8))
    assert drafted(proposer, asked, 2) is None


def test_requests_that_grow_stay_apart() -> None:
    """Whatever order requests are asked about in, each is drafted for from its own tokens."""
    rng = random.Random(4)
    proposer = NgramProposer(config())
    lookup = Lookup.of(config())
    running = [request([rng.randrange(3) for _ in range(rng.randrange(1, 30))]) for _ in range(5)]
    compared = 0
    for _ in range(300):
        asked = rng.sample(running, rng.randrange(1, 6))
        for draft, one in zip(proposer.propose(asked, [3] * len(asked)), asked, strict=True):
            match = plain_search(one.token_ids, lookup)
            if match is None:
                assert draft is None
            else:
                tokens = np.array(one.token_ids, dtype=np.int32)
                assert draft is not None
                assert draft.token_ids == continuation(tokens, match, 3)
                compared += 1
            one.token_ids += [rng.randrange(3) for _ in range(rng.choice([1, 1, 4, 700]))]
        if rng.random() < 0.1:
            gone = running.pop(rng.randrange(5))
            proposer.forget(gone)
            running.append(request([rng.randrange(3)]))
        assert all(len(one.token_ids) < 1 << 20 for one in running)
    assert compared > 200


def test_a_buffer_copies_only_what_is_new() -> None:
    class Counted(list[int]):
        copied = 0

        def __getitem__(self, index):  # type: ignore[no-untyped-def]
            got = super().__getitem__(index)
            self.copied += len(got) if isinstance(index, slice) else 1
            return got

    tokens = Counted(range(1000))
    buffer = TokenBuffer()
    first = buffer.upto(tokens)
    for token in range(1000, 1400):
        tokens.append(token)
        buffer.upto(tokens)
    assert tokens.copied == 1400
    assert buffer.upto(tokens).tolist() == list(range(1400))
    assert first.tolist() == list(range(1000))
