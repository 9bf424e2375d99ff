"""One server process as the router sees it: where it answers, what it has to do and was sent."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from aiohttp import ClientSession, ClientTimeout, DummyCookieJar, UnixConnector

from engine.server.prompt_prefixes import Asked
from engine.server.sent_prefixes import SentPrefixes

State = Literal["starting", "ready", "unwell", "down"]

CONNECT_SECONDS = 5.0
# A name for where there is none: requests go to a socket in the file system.
BASE = "http://replica"


class Replica:
    """A server behind the router.

    It is sent requests while its state is `ready`. `outstanding` are the sequences that it has
    unfinished, `requests` those that it was sent, `failures` those that it did not take up or broke
    off, `restarts` how often its process was started again.

    Args:
        number: its place among the replicas, from 0.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.state: State = "starting"
        self.outstanding = 0
        self.requests = 0
        self.failures = 0
        self.restarts = 0
        self.known_blocks = 0
        self.asked_blocks = 0
        self.sent = SentPrefixes()
        self.suspected = asyncio.Event()
        self._session: ClientSession | None = None

    @property
    def ready(self) -> bool:
        """Whether it can be sent requests."""
        return self.state == "ready" and self._session is not None

    @property
    def connected(self) -> bool:
        """Whether it can be asked anything."""
        return self._session is not None

    @property
    def session(self) -> ClientSession:
        """Connections to it; it must have been connected."""
        assert self._session is not None
        return self._session

    async def connect(self, socket: Path) -> None:
        """Reach it at a socket from now on; what it was sent in an earlier life is forgotten."""
        await self.disconnect()
        self.sent.clear()
        self._session = ClientSession(
            # A connection for each request: one that was kept may have died with its process, and
            # nobody could tell whether a request was still read from it.
            connector=UnixConnector(str(socket), limit=0, force_close=True),
            cookie_jar=DummyCookieJar(),
            timeout=ClientTimeout(total=None, connect=CONNECT_SECONDS),
            auto_decompress=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        )

    async def disconnect(self) -> None:
        """Close all connections to it."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    @contextmanager
    def taking(self, asked: Asked) -> Iterator[None]:
        """Count a request among those that it has, and remember its prompts as sent there."""
        self.requests += 1
        self.outstanding += asked.sequences
        if asked.prompts:
            self.asked_blocks += sum(map(len, asked.prompts))
            self.known_blocks += self.sent.known(asked)
            self.sent.add(asked)
        try:
            yield
        finally:
            self.outstanding -= asked.sequences

    def suspect(self) -> None:
        """Have its health looked at now: a request to it failed."""
        self.failures += 1
        self.suspected.set()

    async def get(self, path: str, seconds: float) -> tuple[int, str]:
        """The status and text of a page of it.

        Raises:
            aiohttp.ClientError: it does not answer.
            TimeoutError: not within so many seconds.
        """
        limit = ClientTimeout(total=seconds)
        async with self.session.get(BASE + path, timeout=limit) as response:
            return response.status, await response.text("utf-8", "replace")
