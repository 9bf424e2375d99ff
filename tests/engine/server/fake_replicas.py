"""Replicas without an engine, and the router in front of them, all in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import uvicorn
from aiohttp import ClientSession, web

from engine.server.connections import limited_protocol
from engine.server.limits import ServerLimits
from engine.server.replica import Replica
from engine.server.router import RouterApp
from engine.server.routing import Router
from engine.server.run_router import guarded
from engine.server.settings import ServerSettings


class FakeReplica:
    """Answers on a socket as it is told; `seen` are the bodies of the requests that it got.

    A request's field `do` says how: `stream` sends `pieces` events with a pause after each, `hold`
    waits until `release` is set, `die` breaks the connection off, in a stream after two events and
    a half, `fail` is an engine that breaks down, and anything else is echoed. A `status` other than
    200 refuses all. `left` counts clients that went away.
    """

    def __init__(self, number: int, folder: Path) -> None:
        self.number = number
        self.socket = folder / f"{number}.sock"
        self.seen: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.release = asyncio.Event()
        self.left = 0
        self.running = 0
        self.status = 200
        self.page = ""
        self.replica = Replica(number)
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, handler_cancellation=True)
        await self._runner.setup()
        await web.UnixSite(self._runner, str(self.socket)).start()
        await self.replica.connect(self.socket)
        self.replica.state = "ready"

    async def stop(self) -> None:
        self.release.set()
        await self.replica.disconnect()
        if self._runner is not None:
            await self._runner.cleanup()

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(text=self.page)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        fields = json.loads(body) if body else {}
        self.seen.append(fields)
        self.headers.append({k.lower(): v for k, v in request.headers.items()})
        self.running += 1
        try:
            return await self._do(request, fields)
        except (asyncio.CancelledError, ConnectionError):
            self.left += 1
            raise
        finally:
            self.running -= 1

    async def _do(self, request: web.Request, fields: dict[str, Any]) -> web.StreamResponse:
        do = fields.get("do")
        if self.status != 200:
            return web.json_response(
                {}, status=self.status, headers={"Retry-After": str(7 - self.number)}
            )
        if do == "fail":
            return web.json_response({}, status=503)
        if do == "hold":
            await self.release.wait()
        if do == "die":
            if fields.get("stream"):
                response = await self._stream(request, {"pieces": 2}, b'data: {"half')
                del response
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        if do == "stream":
            return await self._stream(request, fields, b"")
        return web.json_response({"by": self.number, "path": request.path_qs})

    async def _stream(
        self, request: web.Request, fields: dict[str, Any], last: bytes
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        padding = b" " * fields.get("padding", 0)
        pause = fields.get("pause", 0.0)
        for piece in range(fields["pieces"]):
            await response.write(b"data: %d%s\n\n" % (piece, padding))
            if pause:
                await asyncio.sleep(pause)
        await response.write(last or b"data: [DONE]\n\n")
        if not last:
            await response.write_eof()
        return response


@contextlib.asynccontextmanager
async def fleet(
    folder: Path,
    count: int,
    router: Router,
    limits: ServerLimits,
    keys: tuple[str, ...] = (),
) -> AsyncIterator[tuple[list[FakeReplica], RouterApp, ClientSession]]:
    """Fake replicas, a router over them, and a client of it whose base URL it is."""
    fakes = [FakeReplica(number, folder) for number in range(count)]
    for fake in fakes:
        await fake.start()
    app = RouterApp([fake.replica for fake in fakes], router)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        config = uvicorn.Config(
            guarded(app, ServerSettings(limits=limits, api_keys=keys)),
            http=limited_protocol(limits),
            log_level="critical",
            lifespan="off",
            ws="none",
        )
        server = uvicorn.Server(config)
        with contextlib.suppress(AttributeError):
            server.capture_signals = contextlib.nullcontext  # type: ignore[assignment]
        serving = asyncio.ensure_future(server.serve([listening]))
        try:
            async with asyncio.timeout(30), ClientSession(f"http://127.0.0.1:{port}") as client:
                await until(lambda: server.started)
                yield fakes, app, client
        finally:
            for fake in fakes:
                await fake.stop()
            server.should_exit = True
            await serving


async def until(what: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(seconds):
        while not what():
            await asyncio.sleep(0.002)


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run a test in an event loop of its own; nothing of it may be left."""

    async def whole() -> None:
        await asyncio.wait_for(test(), 60)
        await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})

    asyncio.run(whole())
