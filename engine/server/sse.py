"""Server-sent events, written by hand where they are many.

A chunk is the same from token to token but for its text. So what surrounds the text is made once a
request, and a token costs the escaping of its text and one join.
"""

from __future__ import annotations

import json
from typing import Any

DONE = b"data: [DONE]\n\n"

_ENCODER = json.JSONEncoder(separators=(",", ":"))


def compact(value: object) -> str:
    """JSON in ASCII without spaces."""
    return _ENCODER.encode(value)


def event(content: str) -> bytes:
    """One event; `content` is JSON in ASCII, which never holds a line's end."""
    return f"data: {content}\n\n".encode("ascii")


def error_end(body: dict[str, Any]) -> bytes:
    """The end of a stream that has begun and fails: OpenAI's clients look for an error in it."""
    return event(compact(body)) + DONE


class Envelope:
    """What surrounds the choices of all chunks and answers of a request.

    Args:
        request_id: the answer's id.
        kind: the answer's `object`.
        created: Unix time, seconds.
        model: the model's name.
    """

    __slots__ = ("_head",)

    def __init__(self, request_id: str, kind: str, created: int, model: str) -> None:
        fields = {"id": request_id, "object": kind, "created": created, "model": model}
        self._head = compact(fields)[:-1] + ',"choices":['

    def wrap(self, choices: str, tail: str = "") -> str:
        """The whole object; `choices` is what stands in its list, `tail` further members that
        each begin with a comma."""
        return f"{self._head}{choices}]{tail}}}"
