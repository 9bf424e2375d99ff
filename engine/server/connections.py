"""Connections of clients that are slow, vanish, or send headers without end.

uvicorn waits for ever for a request's headers, and for a client to read; here both have limits.
"""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any

from engine.server.limits import ServerLimits

_PROBE_S = 60  # a connection that is silent for so long is probed, so that a vanished peer shows
_TOO_LARGE = b"\r\n".join(
    (
        b"HTTP/1.1 431 Request Header Fields Too Large",
        b"content-length: 0",
        b"connection: close",
        b"",
        b"",
    )
)

if TYPE_CHECKING:
    from uvicorn.protocols.http.h11_impl import H11Protocol as _Protocol
else:
    _Protocol = object


class _Limited(_Protocol):
    """What is the same for both of uvicorn's HTTP implementations."""

    limits: ServerLimits
    _header_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _seen_cycle: object = None
    _bytes_before = 0

    def connection_made(self, transport: Any) -> None:
        """A client came."""
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if hasattr(socket, "TCP_KEEPIDLE"):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE_S)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client left."""
        self._forget_headers()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take in what the client sent, up to a limit before its headers are complete."""
        before = self.cycle
        if self._header_timer is None and (before is None or before.response_complete):
            self._expect_headers()
        self._bytes_before += len(data)
        super().data_received(data)
        if self.cycle is not before:  # the headers are complete
            self._forget_headers()
        elif (
            self._header_timer is not None
            and self._bytes_before > self.limits.max_header_bytes
            and not self.transport.is_closing()
        ):
            self.transport.write(_TOO_LARGE)
            self.transport.close()

    def pause_writing(self) -> None:
        """The client does not read as fast as it is written to."""
        super().pause_writing()
        if self._write_timer is None:
            seconds = self.limits.write_timeout_s
            self._write_timer = self.loop.call_later(seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read on."""
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def _expect_headers(self) -> None:
        self._bytes_before = 0
        seconds = self.limits.read_timeout_s
        self._header_timer = self.loop.call_later(seconds, self._no_headers)

    def _forget_headers(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _no_headers(self) -> None:
        self._header_timer = None
        if not self.transport.is_closing():
            self.transport.close()


def limited_protocol(limits: ServerLimits) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol with limits: httptools' if it is there, else h11's."""
    base: type[Any]
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as base
    except ImportError:
        from uvicorn.protocols.http.h11_impl import H11Protocol as base
    return type("LimitedProtocol", (_Limited, base), {"limits": limits})
