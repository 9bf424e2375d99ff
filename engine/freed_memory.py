"""Giving the system back what was allocated for a moment."""

from __future__ import annotations

import contextlib
import ctypes


def return_freed_memory() -> None:
    """Give back what is free.

    glibc keeps freed pieces below a size that grows with use, and where they lie between others
    that stay it takes new ones from the system: while a model is laid out that doubles it.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
