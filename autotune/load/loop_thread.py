"""An event loop in a thread of its own, and room for as many connections as a load needs."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

# Connections close as soon as they are told to; what does not is left to the operating system.
CLOSE_S = 5.0
_MOST_FILES = 65_536


@contextmanager
def running_loop() -> Iterator[tuple[asyncio.AbstractEventLoop, list[BaseException]]]:
    """A loop that runs until the end of the block, and what went wrong in its callbacks.

    Afterwards the loop is closed and its thread has ended.
    """
    loop = _loop_factory()()
    errors: list[BaseException] = []

    def on_error(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        errors.append(context.get("exception") or RuntimeError(str(context.get("message"))))

    loop.set_exception_handler(on_error)
    thread = threading.Thread(target=loop.run_forever, name="load-connections", daemon=True)
    thread.start()
    try:
        yield loop, errors
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


def finish(
    work: Coroutine[Any, Any, None], loop: asyncio.AbstractEventLoop, limit_s: float
) -> None:
    """Have the loop of another thread do it, and wait for its end, at most so many seconds."""
    with contextlib.suppress(TimeoutError):
        asyncio.run_coroutine_threadsafe(work, loop).result(limit_s)


def room_for_connections() -> None:
    """Let this process open as many files as the system allows it, and no fewer than before."""
    try:
        import resource
    except ImportError:  # the limit is of Unix
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    wanted = _MOST_FILES if hard == unlimited else min(hard, _MOST_FILES)
    if soft != unlimited and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:  # not on every system
        return asyncio.new_event_loop
    return uvloop.new_event_loop
