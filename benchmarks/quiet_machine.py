"""How much of the machine others used while something was measured, so that it can be done again.

A step that shares its cores with another program takes many times as long: such a measurement tells
of the other program. What others do does not depend on what is measured, so leaving disturbed
measurements out favours nobody. Linux only; elsewhere nothing is known, and nothing is repeated.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

# Share of all cores that others may use.
MOST_BY_OTHERS = 0.04
ATTEMPTS = 4
LONGEST_WAIT_S = 60.0
# Of /proc/stat: user, nice, system, irq, softirq, steal; guests are counted in user.
_BUSY = (0, 1, 2, 5, 6, 7)

T = TypeVar("T")


class Watch:
    """Counts from its making on."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._all, self._own = _busy_seconds(), _own_seconds()

    def others(self) -> float | None:
        """The share of all cores that others, and the host of a virtual machine, used."""
        everyone = _busy_seconds()
        elapsed = time.monotonic() - self._began
        if everyone is None or self._all is None or elapsed <= 0:
            return None
        used = (everyone - self._all) - (_own_seconds() - self._own)
        return max(0.0, used / elapsed / (os.cpu_count() or 1))


def undisturbed(measure: Callable[[], T]) -> tuple[T, float | None]:
    """Measure until others were quiet meanwhile; of `ATTEMPTS` the least disturbed, and how much.

    Between attempts it waits, at most `LONGEST_WAIT_S`, for a second without the others.
    """
    best: tuple[T, float | None] | None = None
    for _ in range(ATTEMPTS):
        _wait()
        watch = Watch()
        result = measure()
        others = watch.others()
        if others is None or others <= MOST_BY_OTHERS:
            return result, others
        if best is None or best[1] is None or others < best[1]:
            best = result, others
    assert best is not None
    return best


def _wait() -> None:
    deadline = time.monotonic() + LONGEST_WAIT_S
    while time.monotonic() < deadline:
        watch = Watch()
        time.sleep(1.0)
        others = watch.others()
        if others is None or others <= MOST_BY_OTHERS:
            return


def _busy_seconds() -> float | None:
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
        return sum(int(fields[i]) for i in _BUSY) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
