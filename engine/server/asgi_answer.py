"""ASGI by hand, where no framework is wanted: whole answers, and clients that leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Sequence
from typing import Any

from starlette.types import Receive, Send

from engine.server.errors import ApiError

Headers = Sequence[tuple[bytes, bytes]]


class ClientGone(Exception):
    """The client left: nobody is to be answered."""


async def read_body(receive: Receive) -> bytes:
    """The body of a request; `BodyLimit` has seen to its length.

    Raises:
        ClientGone: the client left before it was complete.
    """
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do the work, and give it up when the client leaves; its body must have been read.

    Raises:
        ClientGone: the client left.
        Exception: what the work raised.
    """
    task = asyncio.ensure_future(work)
    departure = asyncio.ensure_future(_departure(receive))
    try:
        await asyncio.wait({task, departure}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        task.result()
    finally:
        task.cancel()
        departure.cancel()
        await asyncio.gather(task, departure, return_exceptions=True)


async def _departure(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_answer(send: Send, status: int, headers: Headers, body: bytes) -> None:
    """Send a whole answer; its length is added to the headers."""
    length = (b"content-length", str(len(body)).encode())
    own = [(name, value) for name, value in headers if name != b"content-length"]
    await send({"type": "http.response.start", "status": status, "headers": [*own, length]})
    await send({"type": "http.response.body", "body": body})


async def send_json(send: Send, status: int, page: Any) -> None:
    """Send a whole answer as JSON."""
    headers = [(b"content-type", b"application/json")]
    await send_answer(send, status, headers, json.dumps(page).encode())


async def send_error(send: Send, error: ApiError) -> None:
    """Send an error as OpenAI's API writes it."""
    response = error.response()
    await send_answer(send, response.status_code, response.raw_headers, bytes(response.body))
