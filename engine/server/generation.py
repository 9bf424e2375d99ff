"""Answering with what the engine generates: whole or as a stream, for as long as the client stays.

A request is in the engine only while `Generation.__call__` runs: however that ends, nothing is
left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.output import RequestOutput
from engine.request import SamplingParams
from engine.server.asgi_answer import ClientGone, unless_gone
from engine.server.errors import as_api_error
from engine.server.sse import error_end
from engine.server.submits import Stream, Submits

Outputs = list[tuple[int, RequestOutput]]


@dataclass(frozen=True, slots=True)
class Choice:
    """One output that is to be generated."""

    token_ids: Sequence[int]
    sampling: SamplingParams


class Writer(Protocol):
    """Makes an answer's bytes of the outputs of its choices, which it numbers from 0."""

    def write(self, choice: int, output: RequestOutput) -> bytes:
        """Take an output in; what of the answer can be sent for it."""
        ...

    def end(self) -> bytes:
        """The answer's last bytes, after every choice has ended."""
        ...


class Generation(Response):
    """An answer that generates while it is sent.

    Args:
        engine: generates.
        choices: what to generate.
        writer: makes bytes of outputs.
        stream: send them as server-sent events while they come; else one JSON text at the end.
        priority: of the requests.
        cache_salt: of the requests.
    """

    def __init__(
        self,
        engine: Submits,
        choices: Sequence[Choice],
        writer: Writer,
        *,
        stream: bool,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> None:
        self.status_code = 200
        self.background = None
        self._engine = engine
        self._choices = choices
        self._writer = writer
        self._stream = stream
        self._priority = priority
        self._cache_salt = cache_salt
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Generate and send, until that is done or the client is gone."""
        with contextlib.suppress(ClientGone):
            await unless_gone(receive, self._generate(scope, receive, send))

    async def _generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        streams: list[Stream] = []
        merged: _Merged | None = None
        try:
            if len(self._choices) > 1:
                self._engine.admit(len(self._choices))
            for choice in self._choices:
                stream = self._engine.submit(
                    choice.token_ids,
                    choice.sampling,
                    priority=self._priority,
                    cache_salt=self._cache_salt,
                )
                streams.append(stream)
            merged = _Merged(streams)
            await self._send_all(merged, send)
        except Exception as error:
            told = as_api_error(error)
            if not self._started:
                await told.response()(scope, receive, send)
            else:  # the status is gone
                await _send_body(send, error_end(told.body), more=False)
        finally:
            for stream in streams:
                stream.abort()
            if merged is not None:
                await merged.close()

    async def _send_all(self, merged: _Merged, send: Send) -> None:
        write = self._writer.write
        while outputs := await merged.next():
            content = b"".join([write(choice, output) for choice, output in outputs])
            if self._stream and content:
                await self._start(send)
                await _send_body(send, content, more=True)
        content = self._writer.end()
        await self._start(send, len(content))
        await _send_body(send, content, more=False)

    async def _start(self, send: Send, length: int = 0) -> None:
        """Send status and headers, at the first bytes: until then another status may be right."""
        if self._started:
            return
        self._started = True
        if self._stream:
            # Proxies that collect answers before they pass them on are asked not to.
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),
            ]
        else:
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(length).encode()),
            ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _send_body(send: Send, content: bytes, *, more: bool) -> None:
    await send({"type": "http.response.body", "body": content, "more_body": more})


class _Merged:
    """The outputs of several streams as they come; a single one needs no task of its own."""

    def __init__(self, streams: Sequence[Stream]) -> None:
        self._only = streams[0] if len(streams) == 1 else None
        self._pumps: list[asyncio.Task[None]] = []
        self._queue: asyncio.Queue[tuple[int, RequestOutput] | Exception | None] = asyncio.Queue()
        if len(streams) > 1:
            self._pumps = [
                asyncio.create_task(self._pump(number, stream))
                for number, stream in enumerate(streams)
            ]
        self._running = len(self._pumps)

    async def next(self) -> Outputs:
        """All outputs that wait, at least one; none once every stream has ended.

        Raises:
            Exception: what a stream raised.
        """
        if self._only is not None:
            try:
                return [(0, await anext(self._only))]
            except StopAsyncIteration:
                return []
        outputs: Outputs = []
        while self._running and (not outputs or not self._queue.empty()):
            match await self._queue.get():
                case None:
                    self._running -= 1
                case Exception() as error:
                    raise error
                case output:
                    outputs.append(output)
        return outputs

    async def close(self) -> None:
        """End the tasks."""
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _pump(self, number: int, stream: Stream) -> None:
        try:
            async for output in stream:
                self._queue.put_nowait((number, output))
            self._queue.put_nowait(None)
        except Exception as error:
            self._queue.put_nowait(error)
