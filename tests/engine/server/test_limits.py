"""The whole server on a socket, and clients that are slow, greedy, unknown or suddenly gone."""

from __future__ import annotations

import asyncio
import json
import random
import resource
import socket
import struct
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from engine.server.async_engine import AsyncEngine
from engine.server.draining_server import DrainingServer
from engine.server.settings import ServerSettings
from tests.engine.fake_executor import expected_output
from tests.engine.server.fake_served import (
    Gate,
    ask,
    completion,
    gated_engine,
    head,
    limited,
    read_answer,
    serving,
    some_prompt,
    until_idle,
)

Test = Callable[[int, AsyncEngine, Gate, DrainingServer], Coroutine[Any, Any, None]]


def run(test: Test, settings: ServerSettings | None = None, **knobs: Any) -> None:
    async def main() -> None:
        engine, gate = gated_engine(**knobs)
        async with serving(engine, settings) as (port, served, server):
            try:
                async with asyncio.timeout(60):
                    await test(port, served, gate, server)
            finally:
                gate.open.set()

    asyncio.run(main())


def error_of(body: bytes) -> dict[str, Any]:
    error = json.loads(body)["error"]
    assert error["message"]
    assert isinstance(error, dict)
    return error


async def is_closed(reader: asyncio.StreamReader) -> bool:
    """Wait until the server has closed the connection."""
    try:
        while await reader.read(1 << 16):
            pass
    except ConnectionError:
        pass
    return True


def test_a_thousand_clients_of_whom_many_hang_up() -> None:
    """Whoever stays gets every token; of those who leave nothing stays."""

    async def client(port: int, chance: random.Random) -> None:
        prompt, length = some_prompt(chance), chance.randint(1, 20)
        fate, least = chance.random(), chance.randint(0, 2000)
        whole = completion(prompt, max_tokens=length, stream=fate < 0.9, return_token_ids=True)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            if fate < 0.05:
                writer.write(whole[: chance.randrange(len(whole))])
                return
            writer.write(whole)
            if fate < 0.45:
                got = 0
                while got < least and (part := await reader.read(500)):
                    got += len(part)
                if fate < 0.2:  # a reset rather than an orderly end
                    sock = writer.get_extra_info("socket")
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return
            status, _, body = await read_answer(reader)
            assert status == 200
            assert token_ids(body) == expected_output(prompt, length)
        finally:
            writer.close()

    async def test(port: int, served: AsyncEngine, _gate: Gate, server: DrainingServer) -> None:
        chance = random.Random(3)
        seeds = [random.Random(chance.random()) for _ in range(1000)]
        ended = await asyncio.gather(
            *(client(port, seed) for seed in seeds), return_exceptions=True
        )
        assert [e for e in ended if e is not None] == []
        await until_idle(served)
        while server.server_state.connections or server.server_state.tasks:
            await asyncio.sleep(0.01)  # what is left for ever runs into the limit of `run`

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    try:
        run(test, num_blocks=96, max_num_seqs=32, max_num_batched_tokens=128)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def token_ids(body: bytes) -> list[int]:
    """The tokens of an answer with `return_token_ids`, streamed or whole."""
    if not body.startswith(b"data: "):
        tokens = json.loads(body)["choices"][0]["token_ids"]
        assert isinstance(tokens, list)
        return tokens
    *events, done, rest = body.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    return [t for chunk in chunks for choice in chunk["choices"] for t in choice["token_ids"]]


@pytest.mark.parametrize("how", ["told", "chunked", "expect"])
def test_a_body_that_is_too_long(how: str) -> None:
    long = b" " * 5000
    chunk = b"%x\r\n%s\r\n" % (len(long), long)
    request = {
        "told": head("/v1/completions", "content-length: 5000") + long,
        "chunked": head("/v1/completions", "transfer-encoding: chunked") + chunk + b"0\r\n\r\n",
        # The client waits with its body until it is asked for it.
        "expect": head("/v1/completions", "content-length: 5000", "expect: 100-continue"),
    }[how]

    async def test(port: int, _served: AsyncEngine, _gate: Gate, _server: DrainingServer) -> None:
        status, headers, body = await ask(port, request)
        assert (status, headers["connection"]) == (413, "close")
        assert error_of(body)["code"] == "body_too_large"

    run(test, limited(max_body_bytes=4999))


def test_a_body_as_long_as_is_allowed() -> None:
    request = completion([1], max_tokens=2)
    length = len(request) - request.index(b"\r\n\r\n") - 4

    async def test(port: int, _served: AsyncEngine, _gate: Gate, _server: DrainingServer) -> None:
        assert (await ask(port, request))[0] == 200

    run(test, limited(max_body_bytes=length))


def test_clients_that_do_not_come_to_the_point() -> None:
    """No headers, half of them, or half a body: nobody waits for ever."""

    async def test(port: int, _served: AsyncEngine, _gate: Gate, _server: DrainingServer) -> None:
        for begun in (b"", b"POST /v1/comple", head("/health", method="GET")[:-4]):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(begun)
            assert await is_closed(reader)
            writer.close()
        half = head("/v1/completions", "content-length: 100") + b"{"
        status, _, body = await ask(port, half)
        assert (status, error_of(body)["code"]) == (408, "body_timeout")
        assert (await ask(port, head("/health", "connection: close", method="GET")))[0] == 200

    run(test, limited(read_timeout_s=0.1))


def test_headers_without_end() -> None:
    async def test(port: int, _served: AsyncEngine, _gate: Gate, _server: DrainingServer) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /health HTTP/1.1\r\n" + b"x: y\r\n" * 100)
        first = await reader.readline()
        assert b" 431 " in first
        assert await is_closed(reader)
        writer.close()

    run(test, limited(max_header_bytes=500))


def test_a_client_that_does_not_read() -> None:
    """Its request leaves the engine, and its connection is closed."""

    async def test(port: int, served: AsyncEngine, _gate: Gate, server: DrainingServer) -> None:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, ("127.0.0.1", port))
        # The prompt comes back with every choice, which fills the buffers of both ends.
        body = completion(
            [1] * 200, max_tokens=50, n=64, stream=True, return_token_ids=True, min_tokens=50
        )
        while not server.server_state.connections:
            await asyncio.sleep(0.001)
        (connection,) = server.server_state.connections
        connection.transport.set_write_buffer_limits(high=1024)  # type: ignore[union-attr]
        own = connection.transport.get_extra_info("socket")  # type: ignore[union-attr]
        own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        await loop.sock_sendall(sock, body)
        while not served.num_unfinished:
            await asyncio.sleep(0.001)
        while server.server_state.connections:
            await asyncio.sleep(0.01)
        await until_idle(served)
        assert served.metrics.finished["abort"] > 0
        sock.close()

    run(test, limited(write_timeout_s=0.2), max_num_seqs=8, num_blocks=512)


def test_a_client_that_closes_its_half_is_gone() -> None:
    async def test(port: int, served: AsyncEngine, gate: Gate, _server: DrainingServer) -> None:
        gate.open.clear()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(completion([1], max_tokens=100, stream=True))
        while not gate.entered.is_set():
            await asyncio.sleep(0.001)
        writer.write_eof()
        assert await is_closed(reader)
        # On a busy machine the answer's task may learn of it later than we do.
        while not all(stream._closed for stream in served._streams.values()):
            await asyncio.sleep(0.001)
        gate.open.set()
        await until_idle(served)
        assert served.metrics.finished["abort"] == 1
        writer.close()

    run(test)


def test_a_full_queue_answers_429() -> None:
    async def test(port: int, served: AsyncEngine, gate: Gate, _server: DrainingServer) -> None:
        gate.open.clear()
        waiting = [asyncio.create_task(ask(port, completion([i], max_tokens=2))) for i in range(3)]
        while served.num_unfinished < 3:
            await asyncio.sleep(0.001)
        status, headers, body = await ask(port, completion([9], max_tokens=2))
        assert (status, error_of(body)["type"]) == (429, "rate_limit_error")
        assert int(headers["retry-after"]) >= 1
        gate.open.set()
        assert [answer[0] for answer in await asyncio.gather(*waiting)] == [200] * 3

    run(test, limited(max_waiting=2), max_num_seqs=1)


def test_only_who_shows_a_key_is_served() -> None:
    keys = ServerSettings(api_keys=("first-key", "second-key"))
    request = completion([1], max_tokens=2)

    def showing(*lines: str) -> bytes:
        start = request.index(b"\r\n") + 2
        return request[:start] + "".join(f"{line}\r\n" for line in lines).encode() + request[start:]

    async def test(port: int, _served: AsyncEngine, _gate: Gate, _server: DrainingServer) -> None:
        for good in ("Bearer first-key", "bearer second-key", "Bearer  first-key "):
            assert (await ask(port, showing(f"Authorization: {good}")))[0] == 200
        for bad in (
            [],
            ["Authorization: Bearer"],
            ["Authorization: Bearer first-key2"],
            ["Authorization: Bearer first-ke"],
            ["Authorization: Basic first-key"],
            ["Authorization: first-key"],
            ["Authorization: Bearer first-key", "Authorization: Bearer other"],
        ):
            status, headers, body = await ask(port, showing(*bad))
            assert (status, headers["www-authenticate"]) == (401, "bearer")
            assert error_of(body)["type"] == "authentication_error"
        for path in ("/health", "/ping", "/version", "/load", "/metrics"):
            answer = await ask(port, head(path, "connection: close", method="GET"))
            assert answer[0] == 200
        for path in ("/v1/models", "/openapi.json", "/tokenize"):
            answer = await ask(port, head(path, "connection: close", method="GET"))
            assert answer[0] == 401

    run(test, keys)
    assert "first-key" not in repr(keys)


@pytest.mark.parametrize("second", [False, True], ids=["all end", "one takes too long"])
def test_a_signal_lets_what_runs_end(second: bool) -> None:
    """Meanwhile the server answers: 503 to what is new."""

    async def test(port: int, served: AsyncEngine, gate: Gate, server: DrainingServer) -> None:
        gate.open.clear()
        running = asyncio.create_task(ask(port, completion([5], max_tokens=20, stream=True)))
        while not gate.entered.is_set():
            await asyncio.sleep(0.001)
        server.handle_exit(15, None)
        while not served.draining:
            await asyncio.sleep(0.001)
        status, headers, body = await ask(port, completion([6], max_tokens=2))
        assert (status, error_of(body)["code"]) == (503, "server_draining")
        assert int(headers["retry-after"]) >= 1
        assert (await ask(port, head("/health", "connection: close", method="GET")))[0] == 503
        if second:
            await asyncio.sleep(0.15)
            assert served.engine.has_unfinished
        gate.open.set()
        status, _, body = await running
        assert status == (503 if second else 200)
        if not second:
            assert body.count(b"data: ") > 1
            assert body.endswith(b"data: [DONE]\n\n")
        while not server.should_exit:
            await asyncio.sleep(0.01)

    run(test, ServerSettings(drain_s=0.1 if second else 20))


def test_a_second_signal_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr("os._exit", codes.append)

    async def test(port: int, served: AsyncEngine, gate: Gate, server: DrainingServer) -> None:
        gate.open.clear()
        running = asyncio.create_task(ask(port, completion([5], max_tokens=20)))
        while not gate.entered.is_set():
            await asyncio.sleep(0.001)
        server.handle_exit(2, None)
        assert codes == []
        server.handle_exit(15, None)
        assert codes == [130]
        gate.open.set()
        assert (await running)[0] == 200

    run(test)


def test_a_dead_engine_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.server.draining_server._DEAD_S", 0.2)

    async def test(port: int, served: AsyncEngine, gate: Gate, server: DrainingServer) -> None:
        gate.errors.append(SystemExit("gone"))
        status, _, body = await ask(port, completion([1], max_tokens=5))
        assert (status, error_of(body)["code"]) == (503, "engine_failed")
        status, _, body = await ask(port, head("/health", "connection: close", method="GET"))
        assert (status, json.loads(body)["status"]) == (503, "failed")
        while not server.should_exit:
            await asyncio.sleep(0.02)

    run(test)
