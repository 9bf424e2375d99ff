"""What the routes ask of the engine: requests go in, streams of outputs come back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from engine.output import RequestOutput
from engine.request import SamplingParams


class Stream(Protocol):
    """One request's outputs, in order; it ends after the one with a `finish_reason`.

    Iterating raises `RequestRefused` if the request can never be served, and of
    `engine.server.refusals` `EngineFailed` if the engine broke down or gave the request up,
    `TimedOut` if it took longer than the server allows and `Draining` if the server ended first.
    """

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        """The stream itself."""
        ...

    async def __anext__(self) -> RequestOutput:
        """What was generated since."""
        ...

    def abort(self) -> None:
        """Take the request out of the engine; once it has left, nothing happens."""
        ...


class Submits(Protocol):
    """An engine that takes requests from the event loop."""

    def admit(self, count: int = 1) -> None:
        """See to it that so many requests would be taken in now, all or none.

        Raises:
            Overloaded, Draining, EngineFailed, RequestRefused: as of `submit`.
        """
        ...

    def submit(
        self,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> Stream:
        """Take in a request.

        Raises:
            Overloaded: too many wait already.
            Draining: nothing new is taken.
            EngineFailed: the engine broke down.
            RequestRefused: the request can never be served.
        """
        ...
