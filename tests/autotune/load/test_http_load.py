"""Load over HTTP against a server whose answers are known."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from aiohttp import web

from autotune.load.endpoint import Endpoint
from autotune.load.http_load import HttpLoadResult, run_http_load
from autotune.load.open_loop import LoadProgress
from autotune.workload.materialise import LoadRequest
from engine.request import SamplingParams
from tests.autotune.load.fake_server import FakeServer, serving, sse


def make_requests(
    arrivals: Sequence[float], inputs: int = 8, outputs: int = 4
) -> list[LoadRequest]:
    return [
        LoadRequest(f"r{i}", arrival, tuple(range(i, i + inputs)), outputs)
        for i, arrival in enumerate(arrivals)
    ]


def endpoint(server: FakeServer, **settings: Any) -> Endpoint:
    return Endpoint(server.url, server.model, **settings)


def check(result: HttpLoadResult, requests: Sequence[LoadRequest]) -> None:
    """One record for each request that was sent, and time only goes on."""
    ids = [record.request_id for record in result.records]
    assert len(set(ids)) == len(ids)
    assert set(ids) <= {request.request_id for request in requests}
    assert result.steps == []
    for record in result.records:
        events = [record.intended_send, record.send, *record.token_times]
        assert all(a <= b for a, b in pairwise(events)), record
        assert not record.token_times or events[-1] <= result.duration + 1e-9
        assert record.output_tokens == len(record.token_times)
        assert (record.outcome == "finished") == (record.reason is None)


def test_a_load_is_sent_at_its_times_and_answered() -> None:
    requests = make_requests([0.0, 0.05, 0.06, 0.12, 0.3])
    seen: list[LoadProgress] = []
    with serving(FakeServer()) as server:
        result = run_http_load(endpoint(server), list(reversed(requests)), on_progress=seen.append)
    check(result, requests)
    assert [record.request_id for record in result.records] == ["r0", "r1", "r2", "r3", "r4"]
    assert [record.intended_send for record in result.records] == [0.0, 0.05, 0.06, 0.12, 0.3]
    assert {record.outcome for record in result.records} == {"finished"}
    assert [record.output_token_ids for record in result.records] == [(0, 1, 2, 3)] * 5
    assert [record.input_tokens for record in result.records] == [8] * 5
    assert result.duration >= 0.3
    assert result.notes == []
    assert seen
    assert all(0 <= p.left <= p.sent <= p.total == 5 for p in seen)
    assert [tuple(body["prompt"]) for body in server.asked] == [r.token_ids for r in requests]
    assert all(body["ignore_eos"] and body["temperature"] == 0.0 for body in server.asked)


def test_sends_do_not_wait_for_answers() -> None:
    async def one_after_the_other(
        server: FakeServer, request: web.Request, body: dict[str, Any]
    ) -> web.StreamResponse:
        async with lock:
            return await server.stream(request, body)

    lock = asyncio.Lock()
    requests = make_requests([0.002 * i for i in range(10)], outputs=10)
    with serving(FakeServer(behaviour=one_after_the_other, gap_s=0.005)) as server:
        result = run_http_load(endpoint(server), requests)
    check(result, requests)
    last = result.records[-1]
    assert last.send < result.records[0].token_times[-1]
    assert last.ttft is not None
    assert last.ttft > 9 * 10 * 0.005 * 0.9


@pytest.mark.parametrize(
    ("counts", "sizes", "note"),
    [
        (("token_ids", "continuous_usage", "usage"), [3, 3, 1], None),
        (("continuous_usage", "usage"), [3, 3, 1], None),
        (("usage",), [2, 2, 3], "only at its end"),
        ((), [1, 1, 1], "each chunk was counted as one"),
    ],
)
def test_tokens_are_counted_as_the_server_tells_them(
    counts: tuple[str, ...], sizes: list[int], note: str | None
) -> None:
    requests = make_requests([0.0, 0.01], outputs=7)
    # Chunks that come at once on a busy machine have one time.
    fake = FakeServer(counts=frozenset(counts), tokens_per_chunk=3, gap_s=0.05)
    with serving(fake) as server:
        result = run_http_load(endpoint(server), requests)
    check(result, requests)
    for record in result.records:
        times = sorted(set(record.token_times))
        assert [record.token_times.count(at) for at in times] == sizes
    # Without being told, some answers seem short too.
    assert (note is None) == (not result.notes)
    assert note is None or note in result.notes[0]


def test_a_chat_has_its_text_in_messages() -> None:
    with serving(FakeServer(counts=frozenset(("usage",)))) as server:
        target = endpoint(server, prompts="chat", tokenizer=Words())
        result = run_http_load(target, make_requests([0.0], outputs=5))
    assert result.records[0].output_tokens == 5
    assert server.asked[0]["messages"] == [{"role": "user", "content": "0 1 2 3 4 5 6 7"}]


class Words:
    """A tokenizer with a token a word."""

    def encode(self, text: str) -> list[int]:
        return [0] * len(text.split())

    def decode(self, token_ids: Sequence[int]) -> str:
        return " ".join(map(str, token_ids))


def test_a_tokenizer_counts_what_nobody_tells() -> None:
    requests = make_requests([0.0], outputs=7)
    with serving(FakeServer(counts=frozenset(), tokens_per_chunk=3)) as server:
        result = run_http_load(endpoint(server, prompts="text", tokenizer=Words()), requests)
    assert server.asked[0]["prompt"] == "0 1 2 3 4 5 6 7"
    assert result.records[0].output_tokens == 7
    assert "tokenizer" in result.notes[0]


def answering(status: int, message: str = "no", **headers: str) -> Any:
    async def answer(
        server: FakeServer, request: web.Request, body: dict[str, Any]
    ) -> web.StreamResponse:
        return server.error(status, message, **headers)

    return answer


def test_refusals_are_records() -> None:
    requests = make_requests([0.0, 0.02])
    busy = answering(429, **{"Retry-After": "3"})
    with serving(FakeServer(behaviour=busy)) as server:
        result = run_http_load(endpoint(server), requests)
    check(result, requests)
    reason = "HTTP 429: no (to be tried again after 3 s)"
    assert {(r.outcome, r.reason) for r in result.records} == {("refused", reason)}
    assert result.notes == [f"2 of 2 requests did not finish: {reason}"]


async def garbage(
    server: FakeServer, request: web.Request, body: dict[str, Any]
) -> web.StreamResponse:
    return web.Response(text="<html>hello</html>", content_type="text/html")


async def broken_json(
    server: FakeServer, request: web.Request, body: dict[str, Any]
) -> web.StreamResponse:
    response = await server.stream(request, body, most=2)
    await response.write(b"data: {nonsense\n\ndata: [DONE]\n\n")
    return response


async def error_within(
    server: FakeServer, request: web.Request, body: dict[str, Any]
) -> web.StreamResponse:
    response = await server.stream(request, body, most=2)
    await response.write(sse({"error": {"message": "engine died", "code": 500}}))
    return response


async def dying(
    server: FakeServer, request: web.Request, body: dict[str, Any]
) -> web.StreamResponse:
    response = await server.stream(request, body, most=2)
    await response.write(b'data: {"choices": [{"te')
    assert request.transport is not None
    request.transport.abort()
    return response


async def hanging_up(
    server: FakeServer, request: web.Request, body: dict[str, Any]
) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    raise ConnectionError


async def ending_early(
    server: FakeServer, request: web.Request, body: dict[str, Any]
) -> web.StreamResponse:
    response = await server.stream(request, body, most=2)
    await response.write_eof()
    return response


async def no_stream(
    server: FakeServer, request: web.Request, body: dict[str, Any]
) -> web.StreamResponse:
    choice = {"index": 0, "text": "x", "finish_reason": "length"}
    return web.json_response({"choices": [choice], "usage": server.usage(body, 4)})


async def empty(
    server: FakeServer, request: web.Request, body: dict[str, Any]
) -> web.StreamResponse:
    return web.Response(body=sse({"choices": [{"text": "", "finish_reason": "stop"}]}))


@pytest.mark.parametrize(
    ("behaviour", "tokens", "reason"),
    [
        (garbage, 0, "no stream of events: '<html>hello</html>'"),
        (broken_json, 2, "something else than JSON: '{nonsense'"),
        (error_within, 2, "the server reports: engine died"),
        (dying, 2, "in the middle, after 2 tokens"),
        (hanging_up, 0, "closed the connection without an answer"),
        (ending_early, 2, "in the middle, after 2 tokens"),
        (empty, 0, "holds no tokens"),
    ],
)
def test_answers_that_are_none_are_records_and_the_load_goes_on(
    behaviour: Any, tokens: int, reason: str
) -> None:
    async def every_other(
        server: FakeServer, request: web.Request, body: dict[str, Any]
    ) -> web.StreamResponse:
        if body["prompt"][0] % 2:
            return await server.stream(request, body)
        return await behaviour(server, request, body)

    requests = make_requests([0.0, 0.0, 0.03, 0.03])
    with serving(FakeServer(behaviour=every_other)) as server:
        result = run_http_load(endpoint(server), requests)
    check(result, requests)
    assert [r.outcome for r in result.records] == ["failed", "finished"] * 2
    for record in result.records[::2]:
        assert reason in (record.reason or "")
        assert record.output_tokens == tokens


def test_an_answer_in_one_piece_is_said() -> None:
    with serving(FakeServer(behaviour=no_stream)) as server:
        result = run_http_load(endpoint(server), make_requests([0.0]))
    (record,) = result.records
    assert record.outcome == "finished"
    assert record.output_tokens == 4
    assert record.ttft == record.e2e
    assert "came in one piece" in result.notes[0]


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    requests = make_requests([0.0, 0.02])
    result = run_http_load(Endpoint(f"http://127.0.0.1:{port}", "m"), requests)
    check(result, requests)
    assert {r.outcome for r in result.records} == {"failed"}
    assert {r.reason for r in result.records} == {"no connection: connection refused"}


def test_something_else_than_http_answers() -> None:
    def answer() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n" * 3)
            connection.recv(65536)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        result = run_http_load(Endpoint(url, "m"), make_requests([0.0]))
        thread.join(5)
    assert "is not HTTP/1.1" in (result.records[0].reason or "")


@pytest.mark.parametrize(
    ("head", "rest", "reason"),
    [
        (b"HTTP/1.1 200 OK\r\n", b"X-Header: y\r\n", "has no end of its headers"),
        (b"HTTP/1.1 200 OK\r\n\r\n", b": x\n\n", "longer than 1 MiB"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n",
            b"X-Trailer: y\r\n",
            "longer than 1 MiB",
        ),
    ],
)
def test_an_answer_without_end_is_cut_off(
    head: bytes, rest: bytes, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer() -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            connection.sendall(head)
            while True:
                connection.sendall(rest * 1000)

    monkeypatch.setattr("autotune.load.http_connection.LARGEST_ANSWER", 1 << 20)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        result = run_http_load(Endpoint(url, "m"), make_requests([0.0]), drain_limit=10.0)
        thread.join(5)
        assert not thread.is_alive()
    assert reason in (result.records[0].reason or "")


def test_unfinished_answers_time_out_after_the_drain() -> None:
    requests = make_requests([0.0, 0.05], outputs=1000)
    with serving(FakeServer(gap_s=0.01)) as server:
        result = run_http_load(endpoint(server), requests, drain_limit=0.4)
        deadline = time.monotonic() + 5
        while server.left < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    check(result, requests)
    assert {r.outcome for r in result.records} == {"timed_out"}
    assert result.records[0].reason == "not finished 0.4 s after the last arrival"
    assert all(r.output_tokens > 0 for r in result.records)
    assert 0.4 <= result.duration < 3.0
    assert server.left == 2  # the server was told


def test_stop_keeps_what_was_measured() -> None:
    stop = threading.Event()

    def stop_after_two(progress: LoadProgress) -> None:
        if progress.left == 2:
            stop.set()

    requests = [*make_requests([0.0, 0.01, 60.0]), LoadRequest("long", 0.0, (1, 2), 100_000)]
    with serving(FakeServer()) as server:
        result = run_http_load(endpoint(server), requests, stop=stop, on_progress=stop_after_two)
    check(result, requests)
    assert result.interrupted
    outcomes = {r.request_id: r.outcome for r in result.records}
    assert outcomes == {"r0": "finished", "r1": "finished", "long": "failed"}
    assert "1 of 4 requests were not sent: the load was interrupted" in (result.note or "")


def test_ctrl_c_keeps_what_was_measured() -> None:
    def interrupt(progress: LoadProgress) -> None:
        if progress.left:
            raise KeyboardInterrupt

    requests = [*make_requests([0.0]), LoadRequest("later", 0.0, (3, 4), 100_000)]
    with serving(FakeServer()) as server:
        result = run_http_load(endpoint(server), requests, on_progress=interrupt)
    assert result.interrupted
    assert {r.request_id: r.outcome for r in result.records} == {
        "r0": "finished",
        "later": "failed",
    }
    assert "load-connections" not in {thread.name for thread in threading.enumerate()}


def test_the_time_limit_ends_the_sending_and_is_said() -> None:
    requests = make_requests([0.0, 0.05, 5.0, 6.0])
    with serving(FakeServer()) as server:
        result = run_http_load(endpoint(server), requests, time_limit=0.1)
    check(result, requests)
    assert not result.delivered
    assert result.note == "2 of 4 requests were not sent: the time limit was reached"
    assert result.duration < 4.0


def test_two_requests_of_one_id_are_refused() -> None:
    with pytest.raises(ValueError, match="ids"):
        run_http_load(Endpoint("http://127.0.0.1:9", "m"), make_requests([0.0]) * 2)


def test_keys_salts_and_sampling_are_sent_and_keys_not_shown() -> None:
    sampling = SamplingParams(temperature=0.7, top_k=5, seed=3, max_tokens=1, stop=("x",))
    with serving(FakeServer(key="secret")) as server:
        target = endpoint(server, api_key="secret").with_salt("s1")
        result = run_http_load(target, make_requests([0.0], outputs=3), sampling=sampling)
        refused = run_http_load(endpoint(server), make_requests([0.0]))
    assert result.records[0].output_tokens == 3
    body = server.asked[0]
    assert body["cache_salt"] == "s1"
    assert (body["temperature"], body["top_k"], body["seed"]) == (0.7, 5, 3)
    assert "stop" not in body
    assert "top_p" not in body
    assert "secret" not in repr(target)
    assert refused.records[0].reason == "HTTP 401: no valid key"


def test_many_streams_lose_no_token() -> None:
    requests = make_requests([0.0] * 200, outputs=20)
    with serving(FakeServer(gap_s=0.002)) as server:
        result = run_http_load(endpoint(server), requests)
    check(result, requests)
    assert [r.output_token_ids for r in result.records] == [tuple(range(20))] * 200


def test_connections_are_used_again() -> None:
    ports = set()

    async def watched(
        server: FakeServer, request: web.Request, body: dict[str, Any]
    ) -> web.StreamResponse:
        assert request.transport is not None
        ports.add(request.transport.get_extra_info("peername")[1])
        return await server.stream(request, body)

    requests = make_requests([0.05 * i for i in range(6)], outputs=2)
    with serving(FakeServer(behaviour=watched)) as server:
        result = run_http_load(endpoint(server), requests)
    assert all(r.completed for r in result.records)
    assert len(ports) <= 2
