"""The policy of who gets the next request, and what a router knows of prompts."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

import pytest

from engine.server.prompt_prefixes import (
    BLOCK_BYTES,
    BLOCK_TOKENS,
    NOTHING_KNOWN,
    Asked,
    read_asked,
)
from engine.server.routing import ROUTERS, SPARE_REQUESTS, Routing
from engine.server.sent_prefixes import SentPrefixes


def asked(**body: object) -> Asked:
    return read_asked(json.dumps(body).encode())


def test_prompts_of_two_salts_are_told_apart() -> None:
    salted = [asked(prompt=[1, 2] * 20, cache_salt=salt) for salt in ("a", "b", "a", None)]
    first, other, again, bare = (one.prompts[0] for one in salted)
    assert first == again
    assert not {*first} & {*other}
    assert not {*first} & {*bare}
    assert bare == asked(prompt=[1, 2] * 20).prompts[0]


def test_round_robin_asks_nobody_and_leaves_out_who_cannot() -> None:
    routing = Routing("round_robin", 3)

    def unfinished() -> Sequence[int]:
        raise AssertionError("nobody needs to know")

    assert [routing.choose(unfinished) for _ in range(4)] == [0, 1, 2, 0]
    assert [routing.choose(unfinished, among=[0, 2]) for _ in range(3)] == [2, 0, 2]
    assert routing.choose(unfinished) == 1


def test_least_loaded_takes_equals_in_turn() -> None:
    routing = Routing("least_loaded", 3)
    assert routing.choose(lambda: [2, 1, 1]) == 1
    assert routing.choose(lambda: [2, 1, 1]) == 2
    assert routing.choose(lambda: [2, 1, 1]) == 1
    assert routing.choose(lambda: [0, 5, 7], among=[1, 2]) == 1


def test_a_cache_is_worth_waiting_for_up_to_a_limit() -> None:
    routing = Routing("prefix_aware", 2)
    cached = [10, 0]
    assert routing.choose(lambda: [SPARE_REQUESTS, 0], cached.__getitem__) == 0
    assert routing.choose(lambda: [SPARE_REQUESTS + 1, 0], cached.__getitem__) == 1
    assert routing.choose(lambda: [30, 20], cached.__getitem__) == 0  # half as many more
    assert routing.choose(lambda: [31, 20], cached.__getitem__) == 1
    # Who is out of the question does not set the limit, nor is it asked for its cache.
    assert routing.choose(lambda: [30, 0, 20], [10, 0, 0].__getitem__, [0, 2]) == 0
    assert routing.choose(lambda: [SPARE_REQUESTS, 0], None) == 1  # nothing is known of prompts


@pytest.mark.parametrize("router", ROUTERS)
def test_all_are_used_alike_where_nothing_tells_them_apart(router: str) -> None:
    routing = Routing(router, 4)  # type: ignore[arg-type]
    chosen = [routing.choose(lambda: [0] * 4, lambda _: 0) for _ in range(40)]
    assert [chosen.count(place) for place in range(4)] == [10] * 4


def test_equal_beginnings_have_equal_names() -> None:
    text = "".join(random.Random(0).choices("abcdef ", k=5 * BLOCK_BYTES + 7))
    whole = asked(prompt=text).prompts[0]
    assert len(whole) == 5
    assert asked(prompt=text[: 3 * BLOCK_BYTES] + "x" * 200).prompts[0][:3] == whole[:3]
    assert asked(prompt=text[: 3 * BLOCK_BYTES] + "x" * 200).prompts[0][3] != whole[3]
    # A name stands for all that comes before: the same block elsewhere is another.
    shifted = asked(prompt="y" * BLOCK_BYTES + text).prompts[0]
    assert not set(shifted) & set(whole)


def test_token_ids_are_cut_into_blocks_of_tokens() -> None:
    ids = list(range(4 * BLOCK_TOKENS + 1))
    names = asked(prompt=ids).prompts
    assert len(names) == 1
    assert len(names[0]) == 4
    assert asked(prompt=[ids, ids[: 2 * BLOCK_TOKENS]]).prompts == (names[0], names[0][:2])
    assert asked(prompt=[2**70] * 40).prompts == ((),)
    assert asked(prompt=[1.5] * 40).prompts == ((),)


def test_a_longer_conversation_begins_as_the_shorter_one_did() -> None:
    turns = [
        {"role": "system", "content": "Answer in rhymes, and never in more than ten lines." * 4},
        {"role": "user", "content": "What is a page of a cache, and who owns it?" * 3},
    ]
    first = asked(messages=turns).prompts[0]
    more = [*turns, {"role": "assistant", "content": "A page"}, {"role": "user", "content": "So?"}]
    assert len(first) > 4
    assert asked(messages=more).prompts[0][: len(first)] == first
    # Tools stand in the prompt too, before all messages.
    assert asked(messages=turns, tools=[{"type": "function"}]).prompts[0][0] != first[0]


def test_sequences_are_outputs() -> None:
    assert asked(prompt=["a", "b"], n=3).sequences == 6
    assert asked(messages=[], n=2).sequences == 2
    assert asked(prompt="a").sequences == 1
    assert asked(prompt="a", n=10**9).sequences == 128


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"7", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"n": 1e999}']
)
def test_what_is_no_request_is_nothing_known(body: bytes) -> None:
    assert read_asked(body) == NOTHING_KNOWN


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": 7},
        {"prompt": [None]},
        {"prompt": [["a"]]},
        {"prompt": [{}]},
        {"prompt": "\ud800" * 100},
        {"messages": "x"},
        {"messages": [None, 3]},
        {"prompt": "a", "n": "b"},
        {"prompt": "a", "n": -3},
        {"prompt": "a", "n": True},
    ],
)
def test_odd_requests_do_no_harm(body: dict[str, object]) -> None:
    assert asked(**body).sequences == 1


def test_what_was_sent_is_known_until_it_is_forgotten() -> None:
    sent = SentPrefixes(8 * BLOCK_TOKENS)
    first = asked(prompt=list(range(6 * BLOCK_TOKENS)))
    second = asked(prompt=list(range(1000, 1000 + 4 * BLOCK_TOKENS)))
    assert sent.known(first) == 0
    sent.add(first)
    assert sent.known(first) == 6
    assert sent.known(asked(prompt=list(range(3 * BLOCK_TOKENS)))) == 3
    sent.add(second)
    # Eight blocks are remembered: of the older prompt, the end is forgotten before the beginning.
    assert (sent.known(first), sent.known(second), len(sent)) == (4, 4, 8)
    sent.add(first)
    assert (sent.known(first), sent.known(second)) == (6, 2)
    sent.resize(2 * BLOCK_TOKENS)
    assert (sent.known(first), sent.known(second)) == (2, 0)
    sent.clear()
    assert sent.known(first) == 0


def test_of_a_prompt_longer_than_the_cache_the_beginning_is_remembered() -> None:
    sent = SentPrefixes(4 * BLOCK_TOKENS)
    long = asked(prompt=list(range(9 * BLOCK_TOKENS)))
    sent.add(long)
    assert sent.known(long) == 4


def test_a_body_nested_as_deep_as_can_be_read_does_no_harm() -> None:
    """What is read must be written again, which takes a little more of the stack."""
    for depth in range(900, 1000):
        nested = b"[" * depth + b"]" * depth
        read_asked(b'{"messages":[' + nested + b"]}")
