"""Ctrl-C: the first asks for a clean stop, the second ends at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_on_interrupt(message: str) -> Iterator[threading.Event]:
    """An event that Ctrl-C (or SIGTERM) sets, with a message; a second Ctrl-C interrupts hard."""
    stop = threading.Event()

    def handle(_number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        # Straight to the descriptor: the signal may have come in the middle of another message,
        # and Python's streams cannot be entered twice.
        with contextlib.suppress(OSError):
            os.write(2, f"\n{message}\n".encode())

    earlier = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
