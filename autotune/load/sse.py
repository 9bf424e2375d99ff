"""Server-sent events out of the pieces in which they came (WHATWG HTML, section 9.2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

DONE = b"[DONE]"


def read_events(pieces: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """(when it was whole, its data) of each event that has data.

    Lines end with LF or CRLF. An event ends with an empty line; the last one with the stream too.
    Comments and fields other than `data` are left out.
    """
    rest, data, at = b"", [], 0.0
    for at, piece in pieces:
        lines = (rest + piece).split(b"\n")
        rest = lines.pop()
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                data.append(line[6:] if line[5:6] == b" " else line[5:])
            elif not line and data:
                yield at, b"\n".join(data)
                data = []
    line = rest.removesuffix(b"\r")
    if line.startswith(b"data:"):
        data.append(line[6:] if line[5:6] == b" " else line[5:])
    if data:
        yield at, b"\n".join(data)
