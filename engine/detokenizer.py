"""From a stream of tokens to a stream of text, with stop texts found on the way.

A token need not be whole characters, and text that may yet become part of a stop text must not be
shown: both are held back until they are certain. Each token costs a bounded amount of work,
whatever the length of the output.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from engine.output import TextDelta
from engine.request import Request
from engine.tokenizer import Tokenizer

_UNFINISHED = "\ufffd"
# A character takes at most 4 bytes, so at most 4 tokens; after more, the bytes are not UTF-8.
_LONGEST_UNFINISHED = 8


class _TokenDecoder(Protocol):
    def push(self, token_id: int) -> str:
        """Text that the token made certain."""
        ...

    def flush(self) -> str:
        """Text of an unfinished character at the end."""
        ...


class _ByteLevelDecoder:
    """Every token is some bytes; together they are UTF-8."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _DifferenceDecoder:
    """Text is the difference of two decodes that share the tokens of the previous difference.

    For vocabularies whose tokens read differently at the start of a text (SentencePiece,
    WordPiece). An output whose bytes are not UTF-8 may differ from its one-shot decode.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0  # tokens of _ids whose text was returned
        self._shown_text = ""

    def push(self, token_id: int) -> str:
        if self._tokenizer.is_special(token_id):
            return ""
        self._ids.append(token_id)
        return self._advance(force=len(self._ids) - self._shown > _LONGEST_UNFINISHED)

    def flush(self) -> str:
        return self._advance(force=True)

    def _advance(self, force: bool) -> str:
        text = self._tokenizer.decode(self._ids)
        if text.endswith(_UNFINISHED) and not force:
            return ""
        new = text[len(self._shown_text) :]
        if new or force:
            self._ids = self._ids[self._shown :]
            self._shown = len(self._ids)
            self._shown_text = self._tokenizer.decode(self._ids)
        return new


@dataclass(slots=True)
class _Stream:
    decoder: _TokenDecoder
    stops: tuple[str, ...]
    min_tokens: int
    num_tokens: int = 0
    held: str = ""
    stopped: bool = False
    starts: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        self.starts = frozenset(stop[:n] for stop in self.stops for n in range(1, len(stop)))


class StreamDetokenizer:
    """Turns the tokens of many requests into text; the engine's `Detokenizer`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._streams: dict[str, _Stream] = {}

    def add(self, request: Request) -> None:
        """Begin a request."""
        byte_level = self._tokenizer.byte_level
        decoder = (_ByteLevelDecoder if byte_level else _DifferenceDecoder)(self._tokenizer)
        sampling = request.sampling
        self._streams[request.request_id] = _Stream(
            decoder, tuple(sampling.stop), sampling.min_tokens
        )

    def append(self, request: Request, token_ids: Sequence[int]) -> TextDelta:
        """Take new output tokens and return the text that is now certain."""
        stream = self._streams[request.request_id]
        shown = []
        for count, token_id in enumerate(token_ids, start=1):
            stream.num_tokens += 1
            text = stream.decoder.push(token_id)
            if not stream.stops:
                shown.append(text)
                continue
            old = len(stream.held)
            stream.held += text
            if stream.num_tokens >= stream.min_tokens:
                at = _first_stop(stream.held, stream.stops, old)
                if at is not None:
                    stream.stopped = True
                    return TextDelta("".join(shown) + stream.held[:at], stop_at=count)
            keep = _held_back(stream.held, stream.starts)
            shown.append(stream.held[: len(stream.held) - keep])
            stream.held = stream.held[len(stream.held) - keep :]
        return TextDelta("".join(shown))

    def finish(self, request: Request) -> str:
        """End a request and forget it: the text held back, empty after a stop text."""
        stream = self._streams.pop(request.request_id)
        return "" if stream.stopped else stream.held + stream.decoder.flush()


def _first_stop(text: str, stops: Sequence[str], old: int) -> int | None:
    """Where the first stop text begins that ends after the first `old` characters."""
    found = [text.find(stop, max(old - len(stop) + 1, 0)) for stop in stops]
    return min((at for at in found if at >= 0), default=None)


def _held_back(text: str, starts: frozenset[str]) -> int:
    """Length of the longest end of `text` that begins some stop text."""
    longest = max(map(len, starts), default=0)
    for length in range(min(longest, len(text)), 0, -1):
        if text[-length:] in starts:
            return length
    return 0
