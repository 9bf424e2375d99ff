"""Takes in a request's body as a whole before anybody works on it, bounded in bytes and time."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.server.errors import error_response

BODILESS = ("GET", "HEAD", "OPTIONS")  # requests with these methods are passed on unread
# A body that is too long is read on for a little, and thrown away: a connection that is closed
# with data unread is reset, and the client may lose the answer.
_DISCARDED_BYTES = 8 << 20
_DISCARD_S = 2.0


class BodyLimit:
    """Answers 413 to a body that is too long and 408 to one that is too slow.

    The length is counted as it comes: a body in chunks tells none beforehand.

    Args:
        app: gets the body in one message.
        max_bytes: longest body.
        timeout_s: seconds in which it must have come.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on with its body."""
        if scope["type"] != "http" or scope["method"] in BODILESS:
            await self._app(scope, receive, send)
            return
        refusal: Response | None = None
        body = None
        try:
            async with asyncio.timeout(self._timeout_s):
                body = await self._read(scope, receive)
        except TimeoutError:
            refusal = error_response(
                408,
                f"the request's body did not come within {self._timeout_s:g} s",
                code="body_timeout",
                headers={"connection": "close"},
            )
        except _TooLong:
            refusal = error_response(
                413,
                f"the request's body is above the server's limit of {self._max_bytes} bytes",
                code="body_too_large",
                headers={"connection": "close"},
            )
        if refusal is not None:
            await refusal(scope, receive, send)
        elif body is not None:
            await self._app(scope, _Replay(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None if the client left.

        Raises:
            _TooLong: it is above the limit.
        """
        headers = dict(scope["headers"])
        told = headers.get(b"content-length", b"")
        if told.isdigit() and int(told) > self._max_bytes:
            if b"expect" not in headers:  # else the client waits for our word before it sends
                await _discard(receive)
            raise _TooLong
        parts: list[bytes] = []
        length = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            part = message.get("body", b"")
            length += len(part)
            if length > self._max_bytes:
                if message.get("more_body", False):
                    await _discard(receive)
                raise _TooLong
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)


class _TooLong(Exception):
    """The body is above the limit."""


class _Replay:
    """Gives the body once, then what the connection has to tell."""

    __slots__ = ("_body", "_receive")

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        body, self._body = self._body, None
        if body is None:
            return await self._receive()
        return {"type": "http.request", "body": body, "more_body": False}


async def _discard(receive: Receive) -> None:
    left = _DISCARDED_BYTES
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_S):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
