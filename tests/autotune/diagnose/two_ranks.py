"""Two ranks of one model, with slow links between them or with one that is slow itself."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

from engine.parallel import GroupRanks


@contextlib.contextmanager
def slow_links(ranks: GroupRanks, seconds: float) -> Iterator[None]:
    """Sums over the ranks take so much longer, as they would when the idle links were timed."""
    real = GroupRanks._sum
    clock = ranks._clock

    def slowed(self: GroupRanks, x: Any) -> None:
        real(self, x)
        time.sleep(seconds)

    with (
        mock.patch.object(GroupRanks, "_sum", slowed),
        mock.patch.object(clock, "start_cost", clock.start_cost + seconds),
    ):
        yield


class SlowRank:
    """While entered, a process gets only a part of its time: it is stopped again and again."""

    def __init__(self, pid: int, stopped: float = 60e-3, running: float = 12e-3) -> None:
        self._pid = pid
        self._stopped, self._running = stopped, running
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> SlowRank:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGCONT)

    def _run(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            while not self._ended.is_set():
                os.kill(self._pid, signal.SIGSTOP)
                time.sleep(self._stopped)
                os.kill(self._pid, signal.SIGCONT)
                self._ended.wait(self._running)
