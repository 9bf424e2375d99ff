"""One request's outputs, handed from the engine's thread to the task that waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from engine.errors import EngineError, RequestRefused
from engine.output import RequestOutput
from engine.request import FinishReason, Request
from engine.server.refusals import EngineFailed


class Stream:
    """An async iterator of one request's outputs; the last has a `finish_reason`.

    A reader that comes later than the engine gets what it missed as one output. A reader that is
    cancelled while it waits aborts the request.

    Belongs to the event loop's thread. Iterating raises, after what was generated before:

    - `RequestRefused`: the request can never be served;
    - `EngineFailed`: the engine broke down, or gave the request up;
    - `TimedOut`: it took longer than the server allows;
    - `Draining`: the server ended before the request did.

    Args:
        request: what the engine took in.
        loop: the reader's.
        abort: takes the request out of the engine; called once at most.
    """

    __slots__ = (
        "_abort",
        "_closed",
        "_error",
        "_loop",
        "_pending",
        "_waiter",
        "first_at",
        "last_at",
        "request",
    )

    def __init__(
        self, request: Request, loop: asyncio.AbstractEventLoop, abort: Callable[[str], None]
    ) -> None:
        self.request = request
        # When it got its first token, and its latest, on the engine's clock.
        self.first_at: float | None = None
        self.last_at: float | None = None
        self._loop = loop
        self._abort = abort
        self._pending: RequestOutput | None = None
        self._error: EngineError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._closed = False  # nothing more is taken in

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> RequestOutput:
        while self._pending is None:
            if self._error is not None:
                raise self._error
            if self._closed:
                raise StopAsyncIteration
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            except asyncio.CancelledError:
                self.abort()
                raise
            finally:
                self._waiter = None
        output, self._pending = self._pending, None
        return output

    def abort(self) -> None:
        """Take the request out of the engine; once it has left, nothing happens."""
        self._pending = None
        self._close()

    def fail(self, error: EngineError) -> None:
        """Take the request out of the engine, and tell the reader why."""
        if self._error is None and not self._closed:
            self._error = error
            self._close()

    def put(self, output: RequestOutput) -> None:
        """Take in what the engine made."""
        if self._closed:
            return
        reason = output.finish_reason
        if reason is not None:
            self._closed = True
            if reason is FinishReason.REFUSED:
                text = output.refusal or "the engine refused the request"
                self._error = RequestRefused(text)
            elif reason is FinishReason.ABORT:
                text = output.refusal or "the engine gave the request up"
                self._error = EngineFailed(text)
        if self._error is None:
            held = self._pending
            self._pending = output if held is None else _joined(held, output)
        self._wake()

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            self._abort(self.request.request_id)
        self._wake()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


def _joined(first: RequestOutput, then: RequestOutput) -> RequestOutput:
    logprobs = first.logprobs
    if logprobs is None or then.logprobs is None:
        logprobs = logprobs or then.logprobs
    else:
        logprobs = logprobs + then.logprobs
    return RequestOutput(
        then.request,
        first.token_ids + then.token_ids,
        first.text + then.text,
        then.finish_reason,
        logprobs,
    )
