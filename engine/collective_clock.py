"""How long a rank is in collectives, and how much of that it waits for slower ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

# Sizes that collectives among idle ranks are timed at: a decode step's, and a long prompt's.
IDLE_BYTES = (1 << 10, 1 << 20)
IDLE_ROUNDS = 16
_FLOAT = 4


class CollectiveSeconds(NamedTuple):
    """Seconds in collectives, and of these the ones beyond what idle ranks take for them."""

    total: float = 0.0
    waiting: float = 0.0

    def since(self, before: CollectiveSeconds) -> CollectiveSeconds:
        """The seconds that have come since `before`."""
        return CollectiveSeconds(self.total - before.total, self.waiting - before.waiting)


NO_SECONDS = CollectiveSeconds()


class CollectiveClock:
    """Times collectives that the host waits for, as those of gloo.

    What they take among ranks that do nothing else is `start_cost` seconds and `byte_cost` for each
    byte; a collective that takes longer is one in which this rank came before another. A clock that
    does not run has None for `seconds` and costs nothing.
    """

    def __init__(self, *, runs: bool) -> None:
        self.seconds = NO_SECONDS if runs else None
        self.start_cost = 0.0
        self.byte_cost = 0.0

    def time(self, num_bytes: int, run: Callable[[], None]) -> None:
        """Run a collective over a tensor of so many bytes, and count what it takes."""
        if self.seconds is None:
            run()
            return
        begin = time.perf_counter()
        run()
        taken = time.perf_counter() - begin
        total, waiting = self.seconds
        idle = self.start_cost + self.byte_cost * num_bytes
        self.seconds = CollectiveSeconds(total + taken, waiting + max(0.0, taken - idle))

    def calibrate(self, run: Callable[[int], None]) -> None:
        """Time collectives among idle ranks; `run` is one over so many floats.

        All ranks call this at once. A small one before each lets them begin together. Taken is the
        lower quartile: what delays a collective is not its own, and the fastest is one by luck.
        """
        if self.seconds is None:
            return
        idle = []
        for size in IDLE_BYTES:
            taken = []
            for _ in range(IDLE_ROUNDS):
                run(1)
                begin = time.perf_counter()
                run(size // _FLOAT)
                taken.append(time.perf_counter() - begin)
            idle.append(sorted(taken)[len(taken) // 4])
        small, large = IDLE_BYTES
        self.byte_cost = max(0.0, idle[1] - idle[0]) / (large - small)
        self.start_cost = max(0.0, idle[0] - self.byte_cost * small)
