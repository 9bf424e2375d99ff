"""Requests on the wire: each piece of an answer is stamped when it comes, and read later.

A generator that shares its machine with the server takes from it what it computes. So the parser
is C, a piece costs microseconds, and nothing in it is looked at before its answer is whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

import httptools

CONNECT_S = 10.0
# Servers close idle connections, uvicorn after 5 s; a request on one just closing would be lost.
_IDLE_S = 3.0
LARGEST_ANSWER = 64 << 20
_LARGEST_HEAD = 256 << 10

Clock = Callable[[], float]


@dataclass(slots=True, eq=False)
class Exchange:
    """One request and what came back; times on the clock, in seconds.

    `number` is the caller's. `pieces` are the answer's body as it arrived. `error` says why it did
    not come to its end; it is None too where the server ended the connection, with `cut_off` set.
    """

    number: int
    content: bytes
    send: float | None = None
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    ended: float | None = None
    error: str | None = None
    cut_off: bool = False


class Connection(asyncio.Protocol):
    """One connection; carries one exchange after the other."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client
        self._exchange: Exchange | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._transport: asyncio.Transport | None = None
        self._received = 0
        self._now = 0.0
        self.idle_since = 0.0
        self.lost = False

    def carry(self, exchange: Exchange) -> None:
        """Send a request; its answer follows on this connection."""
        assert self._transport is not None
        assert self._exchange is None
        self._exchange, self._received = exchange, 0
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(exchange.content)

    def abort(self) -> None:
        """Close without waiting for anything."""
        if self._transport is not None:
            self._transport.abort()

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        # A loop of C has transports of its own, with the same methods.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Stamp what came and cut it into heads and bodies."""
        if self._exchange is None or self._parser is None:
            self.abort()  # an answer that nobody asked for
            return
        self._now = self._client.clock()
        self._received += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._end("the server wants to speak another protocol than HTTP/1.1")
            self.abort()
        except httptools.HttpParserError as error:
            self._end(f"the server's answer is not HTTP/1.1: {error}")
            self.abort()
        else:
            self._refuse_floods()

    def eof_received(self) -> bool:
        """Let the transport close itself."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """End what was under way."""
        self.lost = True
        self._client.forget(self)
        if self._exchange is None:
            return
        self._now = self._client.clock()
        exchange = self._exchange
        exchange.cut_off = True
        if exchange.status is None:
            self._end(f"the server closed the connection without an answer{_because(exc)}")
        else:
            # An answer without a length ends like this too: what it holds tells which it is.
            self._end(None if exc is None else f"the connection broke{_because(exc)}")

    # What the parser calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header."""
        if self._exchange is not None:
            self._exchange.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """Keep the status."""
        if self._exchange is not None and self._parser is not None:
            self._exchange.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        """Keep a piece of the answer with its time."""
        if self._exchange is not None:
            self._exchange.pieces.append((self._now, body))

    def on_message_complete(self) -> None:
        """End the exchange, and take the connection back if the server keeps it open."""
        exchange, parser = self._exchange, self._parser
        if exchange is None or parser is None:
            return
        if exchange.status is not None and exchange.status < 200:
            exchange.status = None  # only a notice that the answer will follow
            exchange.headers.clear()
            return
        keep = parser.should_keep_alive()
        self._end(None)
        if keep:
            self.idle_since = self._now
            self._client.take_back(self)
        elif self._transport is not None:
            self._transport.close()

    def _refuse_floods(self) -> None:
        if self._exchange is None:
            return
        if not self._exchange.pieces and self._received > _LARGEST_HEAD:
            self._end("the server's answer has no end of its headers")
            self.abort()
        elif self._received > LARGEST_ANSWER:
            self._end(f"the answer is longer than {LARGEST_ANSWER >> 20} MiB")
            self.abort()

    def _end(self, error: str | None) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.error = error
            self._client.end(exchange, self._now)


class HttpClient:
    """Connections to the server at `url`, as many as there are requests at once, each used again.

    Every method is called from the event loop's thread. Each exchange that was begun ends once:
    then `on_end` is called with it.
    """

    def __init__(self, url: str, *, clock: Clock, on_end: Callable[[Exchange], None]) -> None:
        parts = urlsplit(url)
        self.clock = clock
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host = parts.hostname or ""
        usual = 80 if self._tls is None else 443
        self._port = usual if parts.port is None else parts.port
        self._on_end = on_end
        self._idle: list[Connection] = []
        self._all: set[Connection] = set()
        self._opening: dict[asyncio.Task[None], Exchange] = {}
        self._closed: str | None = None

    def begin(self, exchange: Exchange) -> None:
        """Send a request, on an idle connection or a new one."""
        exchange.send = now = self.clock()
        if self._closed is not None:
            exchange.error = self._closed
            self.end(exchange, now)
            return
        while self._idle:
            connection = self._idle.pop()
            if connection.lost:
                continue
            if now - connection.idle_since <= _IDLE_S:
                connection.carry(exchange)
                return
            connection.abort()
        task = asyncio.get_running_loop().create_task(self._open(exchange))
        self._opening[task] = exchange
        task.add_done_callback(self._opening.pop)

    def cut_all(self, reason: str) -> None:
        """End everything that is under way, with this error, and take nothing more."""
        self._closed = reason
        for task, exchange in list(self._opening.items()):
            task.cancel()
            if exchange.ended is None:
                exchange.error = reason
                self.end(exchange, self.clock())
        for connection in list(self._all):
            connection.abort()
        self._idle.clear()

    async def close(self) -> None:
        """End everything, and wait until the connections are closed."""
        self.cut_all("the load was over")
        for _ in range(100):
            if not self._all and not self._opening:
                return
            await asyncio.sleep(0.01)

    # What the connections call.

    def take_back(self, connection: Connection) -> None:
        """Keep an idle connection for the next request."""
        if not connection.lost and self._closed is None:
            self._idle.append(connection)

    def forget(self, connection: Connection) -> None:
        """Drop a closed connection."""
        self._all.discard(connection)
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)

    def end(self, exchange: Exchange, now: float) -> None:
        """Tell that an exchange is over; only the first time counts."""
        if exchange.ended is None:
            exchange.ended = now
            self._on_end(exchange)

    async def _open(self, exchange: Exchange) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_S):
                _, connection = await loop.create_connection(
                    lambda: Connection(self),
                    self._host,
                    self._port,
                    ssl=self._tls,
                    server_hostname=self._host if self._tls is not None else None,
                )
        except TimeoutError:
            exchange.error = f"no connection within {CONNECT_S:g} s"
            self.end(exchange, self.clock())
            return
        except (OSError, UnicodeError) as error:
            exchange.error = f"no connection: {_sentence(error)}"
            self.end(exchange, self.clock())
            return
        self._all.add(connection)
        if exchange.ended is None:
            connection.carry(exchange)
        else:
            connection.abort()


def _because(error: Exception | None) -> str:
    return "" if error is None else f": {_sentence(error)}"


def _sentence(error: Exception) -> str:
    if isinstance(error, UnicodeError):
        return "no host can be called so"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate cannot be trusted ({error.verify_message})"
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        # asyncio writes addresses into its own text.
        return os.strerror(error.errno).lower()
    return str(error) or type(error).__name__
