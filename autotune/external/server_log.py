"""What a serving engine writes: read as it grows, and its end when something went wrong."""

from __future__ import annotations

import re
from pathlib import Path

# Enough for the tracebacks of all workers, one after the other.
_TAIL_BYTES = 512 << 10
# One reading of what is new: an engine that floods its log must not fill our memory.
_NEW_BYTES = 4 << 20
_COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class ServerLog:
    """A log file from where it ends now; what earlier engines wrote to it is not read.

    Args:
        path: the file, which need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begin = self._at = self._size()
        self._rest = b""

    def new_lines(self) -> list[str]:
        """The whole lines written since the last call."""
        size = self._size()
        if size <= self._at:
            return []
        # Skipped where it is a flood: the stages and facts of a start are no part of it.
        self._at = max(self._at, size - _NEW_BYTES)
        content = self._rest + self._read(self._at, size)
        self._at = size
        # A progress bar writes itself anew from the line's beginning.
        content = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        whole, _, rest = content.rpartition(b"\n")
        self._rest = rest[-_NEW_BYTES:]
        return _lines(whole)

    def tail(self, lines: int | None = None) -> list[str]:
        """The last lines; without a number, as many as its last 512 KiB hold."""
        size = self._size()
        found = _lines(self._read(max(self._begin, size - _TAIL_BYTES), size))
        return found if lines is None else found[-lines:]

    def _size(self) -> int:
        try:
            return self.path.stat().st_size
        except OSError:
            return 0

    def _read(self, start: int, end: int) -> bytes:
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                return file.read(end - start)
        except OSError:
            return b""


def _lines(content: bytes) -> list[str]:
    text = _COLOURS.sub("", content.decode("utf-8", errors="replace"))
    return [line for line in re.split(r"[\r\n]+", text) if line.strip()]
