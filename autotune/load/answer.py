"""What a server's answer says: its tokens with their times, and how it ended.

Tokens are counted by the first of these that the answer allows:

1. the token ids that come with each chunk (`return_token_ids`),
2. the running usage that comes with each chunk (`continuous_usage_stats`),
3. the usage at the end: as many tokens as it says, spread evenly over the chunks,
4. the tokenizer, spread likewise,
5. one a chunk.

From 3 on, which token came in which chunk is not known; the first and the last are right anyway.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from autotune.load.endpoint import Decoder
from autotune.load.http_connection import Exchange
from autotune.load.received import for_people, json_in, whole_characters
from autotune.load.sse import DONE, read_events
from autotune.records import Outcome

CountedBy = Literal["token_ids", "continuous_usage", "usage", "tokenizer", "chunks"]
# Statuses by which a server says that it does not take a request, and not that it broke.
_REFUSALS = range(400, 500)
_BUSY = 503
_TITLE = re.compile(r"<title>(.*?)</title>", re.IGNORECASE | re.DOTALL)
# Beyond these no server means what it says, and taking it at its word would need all memory.
_MOST_TOKENS = 1 << 24
_MOST_TOKEN_ID = (1 << 31) - 1
# Where a chunk has its text: completions, chats, and what models think aloud in either spelling.
_TEXTS = ("text", "content", "reasoning", "reasoning_content")


@dataclass(slots=True)
class Answer:
    """One answer. `token_times` are on the clock that stamped the pieces, in seconds.

    `input_tokens` and `cached_tokens` are None where the server does not tell them. `streamed` is
    false where it came in one piece although a stream was asked for.
    """

    outcome: Outcome = "failed"
    reason: str | None = None
    token_times: tuple[float, ...] = ()
    token_ids: tuple[int, ...] = ()
    counted_by: CountedBy | None = None
    input_tokens: int | None = None
    cached_tokens: int | None = None
    streamed: bool = True


@dataclass(slots=True)
class _Seen:
    """What the events said; a chunk is (time, its token ids, tokens so far, has it text)."""

    chunks: list[tuple[float, list[int] | None, int | None, bool]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    usage: dict[str, Any] | None = None
    finish_reason: str | None = None
    done: bool = False
    error: str | None = None


def read_answer(exchange: Exchange, tokenizer: Decoder | None = None) -> Answer:
    """What came back for a request, whether it came to its end or not."""
    if exchange.status is None:
        return Answer(reason=exchange.error or "the server did not answer")
    if exchange.status != 200:
        return _turned_away(exchange)
    streamed = "json" not in exchange.headers.get("content-type", "")
    seen = _read_stream(exchange) if streamed else _read_whole(exchange)
    answer = _counted(seen, tokenizer)
    answer.streamed = streamed
    usage = seen.usage or {}
    answer.input_tokens = _count(usage.get("prompt_tokens"))
    details = usage.get("prompt_tokens_details")
    if isinstance(details, dict):
        answer.cached_tokens = _count(details.get("cached_tokens"))
    whole = seen.finish_reason is not None or seen.done
    if seen.error is not None:
        answer.reason = seen.error
    elif not whole:
        answer.reason = exchange.error or (
            f"the server ended the answer in the middle, after {len(answer.token_times)} tokens"
        )
    elif seen.finish_reason in ("abort", "error"):
        answer.reason = f"the server gave the request up (finish_reason {seen.finish_reason!r})"
    elif not answer.token_times:
        answer.reason = "the answer holds no tokens"
    else:
        answer.outcome = "finished"
    return answer


def error_message(content: bytes) -> str:
    """What an error's body says to a person: OpenAI's form, a web page's title, or as it is."""
    text = content.decode("utf-8", "replace").strip()
    if text.startswith("<") and (title := _TITLE.search(text)):
        return for_people(title[1])
    found = json_in(text)
    if isinstance(found, dict):
        for key in ("error", "message", "detail"):
            value = found.get(key)
            if isinstance(value, dict):
                value = value.get("message", value)
            if value:
                text = value if isinstance(value, str) else json.dumps(value)
                break
    return for_people(text)


def _turned_away(exchange: Exchange) -> Answer:
    status = exchange.status or 0
    said = error_message(b"".join(piece for _, piece in exchange.pieces))
    reason = f"HTTP {status}: {said}" if said else f"HTTP {status}"
    if 300 <= status < 400:
        to = for_people(exchange.headers.get("location", "another address"))
        reason = f"HTTP {status}: sends to {to}"
    wait = exchange.headers.get("retry-after")
    if wait is not None:
        reason += f" (to be tried again after {for_people(wait)} s)"
    refused = status in _REFUSALS or status == _BUSY
    return Answer("refused" if refused else "failed", reason)


def _read_stream(exchange: Exchange) -> _Seen:
    seen = _Seen()
    events = list(read_events(exchange.pieces))
    for index, (at, data) in enumerate(events):
        if data == DONE:
            seen.done = True
            continue
        event = json_in(data)
        if not isinstance(event, dict):
            if exchange.cut_off and index == len(events) - 1:
                break  # torn in two where the connection ended
            seen.error = f"the server's stream holds something else than JSON: {_start(data)}"
            break
        _take(seen, at, event)
        if seen.error is not None:
            break
    if not events and exchange.pieces and exchange.error is None:
        start = _start(b"".join(piece for _, piece in exchange.pieces))
        seen.error = f"the server's answer is no stream of events: {start}"
    return seen


def _read_whole(exchange: Exchange) -> _Seen:
    """An answer in one piece: all of its tokens came with its last byte."""
    seen = _Seen()
    content = b"".join(piece for _, piece in exchange.pieces)
    event = json_in(content)
    if isinstance(event, dict):
        _take(seen, exchange.pieces[-1][0], event)
        if not seen.chunks and seen.error is None:
            seen.error = f"the server's answer holds no choices: {_start(content)}"
    elif exchange.error is None:
        seen.error = f"the server's answer is not JSON: {_start(content)}"
    return seen


def _take(seen: _Seen, at: float, event: dict[str, Any]) -> None:
    choices = event.get("choices")
    usage = event.get("usage")
    if isinstance(usage, dict):
        seen.usage = usage
    if not choices:
        error = event.get("error")
        if error or event.get("object") == "error":
            seen.error = f"the server reports: {error_message(json.dumps(event).encode())}"
        return
    choice = choices[0] if isinstance(choices, list) else None
    if not isinstance(choice, dict):
        seen.error = "the server's stream holds a chunk whose choices are no list of objects"
        return
    parts = (choice.get("delta"), choice.get("message"))
    part: dict[str, Any] = next((p for p in parts if isinstance(p, dict)), choice)
    text = "".join(value for value in (part.get(name) for name in _TEXTS) if isinstance(value, str))
    so_far = _count(usage.get("completion_tokens")) if isinstance(usage, dict) else None
    seen.chunks.append(
        (at, _ids(choice.get("token_ids")), so_far, bool(text or part.get("tool_calls")))
    )
    seen.texts.append(text)
    if choice.get("finish_reason") is not None:
        seen.finish_reason = str(choice["finish_reason"])


def _counted(seen: _Seen, tokenizer: Decoder | None) -> Answer:
    """The tokens and their times, by the best way that there is."""
    answer = Answer()
    total = _count((seen.usage or {}).get("completion_tokens"))
    by_ids = [(at, len(ids)) for at, ids, _, _ in seen.chunks if ids]
    told = sum(number for _, number in by_ids)
    if told and total in (None, told):
        answer.counted_by = "token_ids"
        answer.token_ids = tuple(i for _, ids, _, _ in seen.chunks for i in ids or ())
        answer.token_times = _times(by_ids)
        return answer
    running = [(at, so_far) for at, _, so_far, _ in seen.chunks if so_far is not None]
    with_text = [at for at, _, _, has_text in seen.chunks if has_text]
    if running and (len(running) > 1 or len(with_text) <= 1):
        answer.counted_by = "continuous_usage"
        steps, before = [], 0
        for at, so_far in running:
            steps.append((at, max(0, so_far - before)))
            before = max(before, so_far)
        answer.token_times = _times(steps)
        return answer
    if not with_text and seen.chunks and (total or told):
        # All of the text may be special tokens, which are not shown.
        with_text = [at for at, _, _, _ in seen.chunks]
    if total:
        answer.counted_by = "usage"
    elif tokenizer is not None and with_text:
        answer.counted_by = "tokenizer"
        total = len(tokenizer.encode(whole_characters("".join(seen.texts))))
    elif with_text:
        answer.counted_by = "chunks"
        total = len(with_text)
    answer.token_times = _spread(with_text, total or 0)
    return answer


def _times(steps: Sequence[tuple[float, int]]) -> tuple[float, ...]:
    return tuple(at for at, number in steps for _ in range(number))


def _spread(chunks: Sequence[float], total: int) -> tuple[float, ...]:
    """`total` tokens over the chunks, evenly: the first has one at least, the last the last."""
    count = len(chunks)
    if total <= count:
        # Chunks without a token of their own, such as the other half of a character.
        return tuple(chunks[(i * (count - 1)) // max(1, total - 1)] for i in range(total))
    ends = [(i + 1) * total // count for i in range(count)]
    return _times(
        [
            (at, end - (ends[i - 1] if i else 0))
            for i, (at, end) in enumerate(zip(chunks, ends, strict=True))
        ]
    )


def _count(value: object) -> int | None:
    return value if type(value) is int and 0 <= value <= _MOST_TOKENS else None


def _ids(value: object) -> list[int] | None:
    if not isinstance(value, list):
        return None
    sound = all(type(i) is int and 0 <= i <= _MOST_TOKEN_ID for i in value)
    return value if sound else None


def _start(content: bytes) -> str:
    text = " ".join(content[:80].decode("utf-8", "replace").split())
    return repr(text)
