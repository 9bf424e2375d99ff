"""Keeping Python's own pauses out of a measurement."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Python lets a waiting thread wait this long for a busy one: 5 ms by default, which the sender
# would add to every request.
_SWITCH_INTERVAL_S = 0.0005


@contextmanager
def quiet_interpreter() -> Iterator[None]:
    """Without garbage collections, and with quick thread switches; as it was before, afterwards.

    A full collection takes tens of milliseconds in a process that holds a model and a workload.
    Cycles made meanwhile wait until the end.
    """
    was_enabled, interval = gc.isenabled(), sys.getswitchinterval()
    gc.disable()
    sys.setswitchinterval(min(interval, _SWITCH_INTERVAL_S))
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        if was_enabled:
            gc.enable()
