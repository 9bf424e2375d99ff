"""Answers as servers write them, and as they break."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from typing import Any

import pytest

from autotune.load.answer import Answer, error_message, read_answer
from autotune.load.http_connection import Exchange
from autotune.load.sse import read_events


def streamed(*events: Any, done: bool = True, gap: float = 1.0) -> Exchange:
    """An answer whose events came `gap` seconds apart."""
    pieces = [
        (
            gap * (i + 1),
            b"data: " + (e if isinstance(e, bytes) else json.dumps(e).encode()) + b"\n\n",
        )
        for i, e in enumerate(events)
    ]
    if done:
        pieces.append((gap * (len(events) + 1), b"data: [DONE]\n\n"))
    headers = {"content-type": "text/event-stream; charset=utf-8"}
    return Exchange(0, b"", status=200, headers=headers, pieces=pieces)


def text(content: str, finish: str | None = None, **more: Any) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "text": content, "finish_reason": finish}
    usage = more.pop("usage", None)
    event: dict[str, Any] = {"choices": [choice | more]}
    return event if usage is None else event | {"usage": {"completion_tokens": usage}}


def delta(finish: str | None = None, **content: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": content, "finish_reason": finish}]}


def usage(tokens: int, **more: Any) -> dict[str, Any]:
    return {"choices": [], "usage": {"completion_tokens": tokens, **more}}


def test_events_are_the_same_however_they_are_cut() -> None:
    stream = (
        b": a comment\n\ndata: one\n\nevent: x\r\ndata:two\r\n\r\nid: 3\n\n"
        b"data: a\ndata: b\n\ndata:  spaced\n\ndata: last"
    )
    expected = [b"one", b"two", b"a\nb", b" spaced", b"last"]
    assert [data for _, data in read_events([(0.0, stream)])] == expected
    rng = random.Random(4)
    for _ in range(200):
        cuts = sorted(rng.sample(range(1, len(stream)), rng.randint(1, 12)))
        ends = [0, *cuts, len(stream)]
        pieces = [(float(b), stream[a:b]) for a, b in itertools.pairwise(ends)]
        found = list(read_events(pieces))
        assert [data for _, data in found] == expected
        # An event's time is that of the piece that ended it.
        blank = stream.index(b"one\n\n") + len(b"one\n\n")
        assert found[0][0] == min(end for end in ends if end >= blank)


def test_token_ids_count_first() -> None:
    answer = read_answer(
        streamed(
            text("a", token_ids=[5, 6], usage=9),
            text("", token_ids=[], usage=9),
            text("b", "length", token_ids=[7], usage=9),
            usage(3, prompt_tokens=4, prompt_tokens_details={"cached_tokens": 2}),
        )
    )
    assert answer == Answer(
        outcome="finished",
        token_times=(1.0, 1.0, 3.0),
        token_ids=(5, 6, 7),
        counted_by="token_ids",
        input_tokens=4,
        cached_tokens=2,
    )


def test_ids_that_contradict_the_usage_are_not_believed() -> None:
    answer = read_answer(
        streamed(text("a", token_ids=[5]), text("b", "length", token_ids=[6]), usage(4))
    )
    assert answer.counted_by == "usage"
    assert answer.token_times == (1.0, 1.0, 2.0, 2.0)
    assert answer.token_ids == ()


@pytest.mark.parametrize("ids", [["5"], [-1], [1 << 40], [True], "56", {"5": 6}])
def test_ids_that_are_none_are_not_believed(ids: Any) -> None:
    answer = read_answer(streamed(text("a", "length", token_ids=ids), usage(1)))
    assert (answer.outcome, answer.counted_by, answer.token_ids) == ("finished", "usage", ())


@pytest.mark.parametrize("count", [10**12, -1, 2.5, "7", True, None])
def test_a_count_that_no_answer_has_is_not_believed(count: Any) -> None:
    answer = read_answer(streamed(text("a"), text("b", "stop"), usage(count, prompt_tokens=count)))
    assert (answer.counted_by, answer.token_times) == ("chunks", (1.0, 2.0))
    assert answer.input_tokens is None


def test_halves_of_a_character_are_joined_before_they_are_counted() -> None:
    class Bytes:
        def encode(self, text: str) -> list[int]:
            return list(text.encode())

        def decode(self, token_ids: Sequence[int]) -> str:
            return bytes(token_ids).decode()

    answer = read_answer(streamed(text("\ud83d"), text("\ude00", "stop")), Bytes())
    assert answer.counted_by == "tokenizer"
    assert len(answer.token_times) == 4
    # A half without the other is some character.
    assert len(read_answer(streamed(text("\ud83d", "stop")), Bytes()).token_times) == 3


def test_running_usage_counts_tokens_that_show_no_text() -> None:
    answer = read_answer(
        streamed(text("", usage=1), text("ab", usage=3), text("", "length", usage=4), usage(4))
    )
    assert answer.counted_by == "continuous_usage"
    assert answer.token_times == (1.0, 2.0, 2.0, 3.0)


@pytest.mark.parametrize(
    ("total", "times"),
    [(3, (1.0, 2.0, 3.0)), (7, (1, 1, 2, 2, 3, 3, 3)), (2, (1.0, 3.0)), (1, (1.0,))],
)
def test_the_total_is_spread_over_the_chunks(total: int, times: tuple[float, ...]) -> None:
    answer = read_answer(streamed(text("a"), text("b"), text("c"), text("", "stop"), usage(total)))
    assert answer.counted_by == "usage"
    assert answer.token_times == times
    assert answer.outcome == "finished"


def test_the_role_chunk_of_a_chat_is_no_token() -> None:
    events = [
        delta(role="assistant", content=""),
        delta(reasoning_content="hm"),
        delta(content="a"),
        delta(tool_calls=[{"function": {"arguments": "{}"}}]),
        delta("stop"),
    ]
    answer = read_answer(streamed(*events))
    assert answer.counted_by == "chunks"
    assert answer.token_times == (2.0, 3.0, 4.0)


def test_tokens_without_any_text_are_counted_by_the_total() -> None:
    answer = read_answer(streamed(text(""), text("", "length"), usage(2)))
    assert answer.token_times == (1.0, 2.0)


def test_a_torn_event_at_the_end_of_a_broken_connection_is_left_out() -> None:
    exchange = streamed(text("a"), b'{"choices": [{"te', done=False)
    exchange.cut_off = True
    answer = read_answer(exchange)
    assert answer.outcome == "failed"
    assert answer.reason == "the server ended the answer in the middle, after 1 tokens"
    exchange.error = "the connection broke: connection reset by peer"
    assert read_answer(exchange).reason == exchange.error


def test_a_whole_answer_on_a_connection_that_then_broke_is_finished() -> None:
    exchange = streamed(text("a", "length"), done=False)
    exchange.cut_off, exchange.error = True, "the connection broke"
    assert read_answer(exchange).outcome == "finished"


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        ([text("a"), {"error": {"message": "engine died"}}], "the server reports: engine died"),
        ([text("a"), {"object": "error", "message": "bad"}], "the server reports: bad"),
        ([text("a"), {"error": "plain"}], "the server reports: plain"),
        ([text("a", "abort")], "gave the request up"),
        ([text("", "stop")], "holds no tokens"),
        ([{"choices": "no"}], "no list of objects"),
        ([[1, 2]], "something else than JSON: '[1, 2]'"),
        ([b"{oops"], "something else than JSON: '{oops'"),
        ([b"\xff\xfe"], "something else than JSON"),
        ([b"[" * 100_000], "something else than JSON: '[[[["),
        ([{"choices": [{"delta": "x", "message": ["y"]}]}], "holds no tokens"),
    ],
)
def test_streams_that_are_no_answers(events: Sequence[Any], reason: str) -> None:
    answer = read_answer(streamed(*events))
    assert answer.outcome == "failed"
    assert reason in (answer.reason or "")


@pytest.mark.parametrize(
    ("status", "headers", "outcome", "reason"),
    [
        (429, {"retry-after": "3"}, "refused", "HTTP 429: no (to be tried again after 3 s)"),
        (503, {}, "refused", "HTTP 503: no"),
        (400, {}, "refused", "HTTP 400: no"),
        (500, {}, "failed", "HTTP 500: no"),
        (307, {"location": "http://else"}, "failed", "HTTP 307: sends to http://else"),
    ],
)
def test_statuses(status: int, headers: dict[str, str], outcome: str, reason: str) -> None:
    pieces = [(1.0, b'{"error": {"mess'), (1.0, b'age": "no"}}')]
    answer = read_answer(Exchange(0, b"", status=status, headers=headers, pieces=pieces))
    assert (answer.outcome, answer.reason) == (outcome, reason)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"error": {"message": "a  b"}}', "a b"),
        (b'{"detail": [{"loc": ["x"]}]}', '[{"loc": ["x"]}]'),
        (b'{"message": "c"}', "c"),
        (b"<html>\n oops", "<html> oops"),
        (b"<!doctype html><TITLE>502 Bad\nGateway</TITLE><p>nginx", "502 Bad Gateway"),
        (b'{"error": "a\\u001b[31mb \\ud800"}', "a [31mb \ufffd"),
        (b"[" * 100_000, "[" * 300 + "…"),
        (b"", ""),
        (b"x" * 1000, "x" * 300 + "…"),
    ],
)
def test_messages_of_errors(content: bytes, message: str) -> None:
    assert error_message(content) == message


def test_an_answer_in_one_piece() -> None:
    body = {
        "choices": [{"message": {"content": "a b"}, "finish_reason": "stop"}],
        "usage": {"completion_tokens": 2},
    }
    headers = {"content-type": "application/json"}
    content = json.dumps(body).encode()
    exchange = Exchange(0, b"", status=200, headers=headers, pieces=[(1.0, content[:9])])
    exchange.pieces.append((2.0, content[9:]))
    answer = read_answer(exchange)
    assert answer.token_times == (2.0, 2.0)
    assert not answer.streamed
    exchange.pieces.pop()
    assert "not JSON" in (read_answer(exchange).reason or "")
    exchange.pieces[:] = [(1.0, b'{"choices": []}')]
    assert "holds no choices" in (read_answer(exchange).reason or "")
