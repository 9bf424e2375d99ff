"""An engine that computes nothing, behind an event loop or a socket."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn

from engine.batch import Batch, BatchResult
from engine.engine import Engine
from engine.server.app import create_app
from engine.server.async_engine import AsyncEngine
from engine.server.connections import limited_protocol
from engine.server.draining_server import DrainingServer
from engine.server.limits import ServerLimits
from engine.server.served_model import ServedModel
from engine.server.settings import ServerSettings
from tests.engine.fake_executor import VOCABULARY, FakeExecutor, assert_idle, make_engine

MAX_MODEL_LEN = 256


class Gate:
    """An executor that waits at each step while the gate is shut, and fails where it is told to."""

    def __init__(self, inner: FakeExecutor) -> None:
        self.inner = inner
        self.inner.keep_batches = False
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Event()
        self.errors: list[BaseException] = []

    def execute(self, batch: Batch) -> BatchResult:
        self.entered.set()
        assert self.open.wait(30), "the gate was never opened"
        if self.errors:
            raise self.errors.pop(0)
        return self.inner.execute(batch)


def gated_engine(**knobs: Any) -> tuple[Engine, Gate]:
    engine, executor = make_engine(**{"max_model_len": MAX_MODEL_LEN, **knobs})
    gate = Gate(executor)
    engine.executor = gate
    return engine, gate


def fake_model() -> ServedModel:
    return ServedModel(
        names=("fake",),
        root="fake",
        tokenizer=None,
        chat_template=None,
        max_model_len=MAX_MODEL_LEN,
        vocab_size=VOCABULARY,
    )


@asynccontextmanager
async def serving(
    engine: Engine, settings: ServerSettings | None = None
) -> AsyncIterator[tuple[int, AsyncEngine, DrainingServer]]:
    """The whole server on a free port of this loop; afterwards nothing must be left of it."""
    settings = settings or ServerSettings()
    limits = settings.limits
    served = AsyncEngine(engine, limits=limits)
    server = DrainingServer(
        uvicorn.Config(
            create_app(served, fake_model(), settings),
            port=0,
            http=limited_protocol(limits),
            ws="none",
            lifespan="on",
            log_config=None,
            timeout_graceful_shutdown=5,
        ),
        served,
        drain_s=settings.drain_s,
    )
    before = asyncio.all_tasks()
    task = asyncio.create_task(server._serve())
    try:
        async with asyncio.timeout(20):
            while not server.started:
                await asyncio.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1], served, server
    finally:
        server.should_exit = True
        await asyncio.wait_for(task, 20)
    assert not served.stepping
    assert asyncio.all_tasks() - before == set(), "a task is left"


async def until_idle(served: AsyncEngine) -> None:
    """Wait until every request has left, and see that nothing of them is left."""
    async with asyncio.timeout(20):
        while served.num_unfinished or served.engine.has_unfinished:
            await asyncio.sleep(0.005)
    assert_idle(served.engine)
    assert not served._streams
    assert not served._timers


def some_prompt(chance: random.Random, longest: int = 40) -> list[int]:
    return [chance.randrange(VOCABULARY) for _ in range(chance.randint(1, longest))]


def head(path: str, *lines: str, method: str = "POST") -> bytes:
    """An HTTP request's line and headers."""
    return "\r\n".join([f"{method} {path} HTTP/1.1", "host: fake", *lines, "", ""]).encode()


def completion(prompt: list[int], **fields: Any) -> bytes:
    """A whole request for a completion."""
    body = json.dumps({"prompt": prompt, "temperature": 0, **fields}).encode()
    return (
        head(
            "/v1/completions",
            "content-type: application/json",
            "connection: close",
            f"content-length: {len(body)}",
        )
        + body
    )


async def ask(port: int, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of an answer; the connection is closed afterwards."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        return await read_answer(reader)
    finally:
        writer.close()


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines if line)
    if "content-length" in headers:
        body = await reader.readexactly(int(headers["content-length"]))
    else:
        body = b""
        while size := int(await reader.readline(), 16):
            body += (await reader.readexactly(size + 2))[:-2]
    return int(first.split(" ")[1]), headers, body


def limited(**limits: Any) -> ServerSettings:
    return ServerSettings(limits=ServerLimits(**limits))
