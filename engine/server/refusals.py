"""Why the server does not serve a request now; a request that can never be served is refused by
`engine.errors.RequestRefused`.

Each carries one sentence for the client.
"""

from __future__ import annotations

from engine.errors import EngineError


class Overloaded(EngineError):
    """Too many requests wait already; the client may come again in `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Draining(EngineError):
    """The server finishes what it has and takes nothing new."""


class EngineFailed(EngineError):
    """The engine broke down, and with it the requests that it had."""


class TimedOut(EngineError):
    """The request took longer than the server allows."""
