"""One request passed on to one replica, and its answer passed back as it comes."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiohttp import ClientError, ClientResponse
from starlette.types import Scope, Send
from yarl import URL

from engine.server.errors import ApiError
from engine.server.replica import BASE, Replica
from engine.server.sse import error_end

# Of one connection, not of the request (RFC 9110, 7.6.1), or made anew for each connection.
_HOP = {
    b"connection",
    b"keep-alive",
    b"proxy-authenticate",
    b"proxy-authorization",
    b"te",
    b"trailer",
    b"transfer-encoding",
    b"upgrade",
    b"content-length",
    b"expect",
    b"host",
    b"date",
    b"server",
    # Keys are looked at by the router alone.
    b"authorization",
}
_EVENT_END = b"\n\n"


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer of a replica."""

    status: int
    headers: Sequence[tuple[bytes, bytes]]
    body: bytes

    @property
    def retry_after(self) -> float:
        """After how many seconds the client may come again; endless if it is not told."""
        told = next((v for k, v in self.headers if k == b"retry-after"), b"")
        return int(told) if told.isdigit() else math.inf


@asynccontextmanager
async def request_to(replica: Replica, scope: Scope, body: bytes) -> AsyncIterator[ClientResponse]:
    """Send a request to a replica; gives its answer once that begins, and closes it in the end.

    Raises:
        ApiError: 404, no path can be made of what was asked for.
        aiohttp.ClientError: the replica cannot be reached, or broke off.
    """
    path = scope.get("raw_path") or scope["path"].encode()
    if not path.startswith(b"/") or not path.isascii():
        raise ApiError(404, "there is no such path here", code="not_found")
    query = scope["query_string"]
    target = path + b"?" + query if query else path
    response = await replica.session.request(
        scope["method"],
        URL(BASE + target.decode("ascii", "replace"), encoded=True),
        data=body or None,
        headers=[
            (name.decode(), value.decode())
            for name, value in _end_to_end(scope["headers"])
            if name.isascii() and value.isascii()
        ],
        allow_redirects=False,
    )
    try:
        yield response
    except BaseException:
        response.close()  # the replica sees that nobody waits any more
        raise
    response.release()


async def whole(response: ClientResponse, replica: Replica) -> Answer:
    """All of a replica's answer.

    Raises:
        aiohttp.ClientError: it broke off.
    """
    body = await response.read()
    return Answer(response.status, _of_answer(response, replica), body)


def is_stream(response: ClientResponse) -> bool:
    """Whether an answer comes piece by piece."""
    return response.content_type == "text/event-stream"


async def pass_stream(
    response: ClientResponse, replica: Replica, send: Send, broken_off: ApiError
) -> bool:
    """Pass on events as they come; whether the replica sent all of them.

    If it breaks off, the stream ends with an error. No event is ever passed on in part.
    """
    headers = _of_answer(response, replica)
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    rest = b""
    try:
        while chunk := await response.content.readany():
            rest += chunk
            end = rest.rfind(_EVENT_END) + len(_EVENT_END)
            if end >= len(_EVENT_END):
                await send({"type": "http.response.body", "body": rest[:end], "more_body": True})
                rest = rest[end:]
    except (ClientError, OSError):
        rest = error_end(broken_off.body)
        await send({"type": "http.response.body", "body": rest})
        return False
    await send({"type": "http.response.body", "body": rest})
    return True


def _of_answer(response: ClientResponse, replica: Replica) -> list[tuple[bytes, bytes]]:
    """The headers of an answer, and which replica it is from."""
    return [*_end_to_end(response.raw_headers), (b"x-replica", str(replica.number).encode())]


def _end_to_end(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Headers that are passed on, names in lower case."""
    lowered = [(name.lower(), value) for name, value in headers]
    named = {
        token.strip().lower()
        for name, value in lowered
        if name == b"connection"
        for token in value.split(b",")
    }
    return [(n, v) for n, v in lowered if n not in _HOP and n not in named]
