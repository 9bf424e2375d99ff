"""What a server sent, taken with care: it may be cut, broken, or anything at all."""

from __future__ import annotations

import json
from typing import Any

_LONGEST = 300


def json_in(content: bytes | str) -> Any:
    """The JSON that it holds; None where it holds none, or nests deeper than can be read."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def for_people(text: str) -> str:
    """Text of a server as it may stand in a sentence: one line, shortened, nothing unprintable."""
    printable = (c if c.isprintable() else " " for c in whole_characters(text))
    line = " ".join("".join(printable).split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"


def whole_characters(text: str) -> str:
    """The text, halves of characters joined or replaced: JSON can name them, nothing takes them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
