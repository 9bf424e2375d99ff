"""uvicorn, but it finishes what runs before it ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Protocol

import uvicorn
from starlette.types import ASGIApp

from engine.errors import EnvironmentLacks
from engine.server.connections import limited_protocol
from engine.server.settings import ServerSettings

# Health tells of a dead engine for so long before the process ends, to be started again.
_DEAD_S = 2.0
# How long answers that are complete may take to be read by their clients.
_FLUSH_S = 5
_INTERRUPTED = 130


class Drainable(Protocol):
    """What serves the requests: an engine, or a router."""

    @property
    def failed(self) -> Exception | None:
        """Why nothing can be served any more, if so."""
        ...

    @property
    def num_unfinished(self) -> int:
        """Requests that have not left."""
        ...

    async def drain(self, timeout_s: float) -> bool:
        """Take nothing new and wait for what runs; whether all of it ended within so long."""
        ...


class DrainingServer(uvicorn.Server):
    """uvicorn, but it goes on answering while it drains: 503 to what is new.

    Args:
        config: uvicorn's.
        engine: what is drained at the first signal.
        drain_s: seconds that running requests are given.
        ready: called once requests are taken.
        say: told what becomes of a signal.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        engine: Drainable,
        *,
        drain_s: float,
        ready: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        super().__init__(config)
        self._engine = engine
        self._drain_s = drain_s
        self._ready = ready
        self._say = say
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._signalled = False
        self._dead_since: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen.

        Raises:
            EnvironmentLacks: the address cannot be listened on.
        """
        self._loop = asyncio.get_running_loop()
        try:
            await super().startup(sockets)
        except OSError as error:  # whoever else was bound to it meanwhile was faster to listen
            raise EnvironmentLacks(
                f"cannot listen: {error.strerror or error}; choose another address"
            ) from error
        if self.started and not self._signalled:
            self._ready()

    async def on_tick(self, counter: int) -> bool:
        """Look ten times a second whether to end."""
        if self._engine.failed is not None:
            self._dead_since = self._dead_since or time.monotonic()
            if time.monotonic() - self._dead_since > _DEAD_S:
                self._say(f"ending: {self._engine.failed}")
                self.should_exit = True
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, end at once at the second."""
        del frame
        if self._signalled:
            if self.config.uds is not None:
                with contextlib.suppress(OSError):
                    Path(self.config.uds).unlink()
            os._exit(_INTERRUPTED)
        self._signalled = True
        if self._loop is None:  # nothing was served yet
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin_draining, signal.Signals(sig).name)

    def _begin_draining(self, name: str) -> None:
        count = self._engine.num_unfinished
        requests = "1 request" if count == 1 else f"{count} requests"
        self._say(
            f"{name}: finishing {requests}, at most {self._drain_s:g} s; a second signal ends at "
            "once"
        )
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        try:
            if not await self._engine.drain(self._drain_s):
                self._say(f"requests that took longer than {self._drain_s:g} s were given up")
        finally:
            self.should_exit = True


def uvicorn_config(app: ASGIApp, settings: ServerSettings, *, lifespan: bool) -> uvicorn.Config:
    """How uvicorn is to serve an app.

    Args:
        app: what is served.
        settings: of the server.
        lifespan: whether the app wants to be told when it begins and ends.
    """
    if settings.access_log:
        _log_access()
    return uvicorn.Config(
        app,
        uds=settings.uds,
        http=limited_protocol(settings.limits),
        ws="none",
        lifespan="on" if lifespan else "off",
        log_config=None,
        access_log=settings.access_log,
        server_header=False,
        timeout_keep_alive=max(1, round(settings.limits.keep_alive_s)),
        timeout_graceful_shutdown=_FLUSH_S,
    )


def _log_access() -> None:
    logger = logging.getLogger("uvicorn.access")
    logger.setLevel(logging.INFO)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)
