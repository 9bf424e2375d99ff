"""What a step hands back per request, and the seam to the detokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.request import FinishReason, Request, TokenLogprobs


@dataclass(slots=True)
class RequestOutput:
    """What one request got from one step.

    `token_ids` and `text` are new since the request's previous output; `logprobs` stands beside
    `token_ids` where it was asked for. Once `finish_reason` is set nothing follows.

    The concatenated texts are the decoded output without stop texts and without the end or stop
    token; the concatenated token ids are `request.output_token_ids`.
    """

    request: Request
    token_ids: list[int]
    text: str
    finish_reason: FinishReason | None
    logprobs: list[TokenLogprobs] | None = None

    @property
    def request_id(self) -> str:
        """The id that the request was added with."""
        return self.request.request_id

    @property
    def refusal(self) -> str | None:
        """Why the request was refused or given up, in one sentence."""
        return self.request.refusal


@dataclass(slots=True)
class TextDelta:
    """Text that became certain, and whether a stop text was met.

    `stop_at` is None, or how many of the appended tokens belong to the output: those up to and
    including the one that completes the stop text. `text` then ends before the stop text.
    """

    text: str
    stop_at: int | None = None


class Detokenizer(Protocol):
    """Turns the tokens of many requests into text as they come.

    Per request: `add` once, then any number of `append`, then `finish` once, whatever the reason.
    Preemption is not seen here. Called from the engine's stepping thread alone.
    """

    def add(self, request: Request) -> None:
        """Begin a request; its prompt is `request.token_ids`, its stop texts in `sampling.stop`."""
        ...

    def append(self, request: Request, token_ids: Sequence[int]) -> TextDelta:
        """Take new output tokens and return the text that is now certain.

        Text that may still become part of a stop text or of an unfinished character is held back.
        A stop text counts only from output token `sampling.min_tokens` on: a token with a lower
        1-based number cannot complete one. The end or stop token that ended a request is not
        passed here.
        """
        ...

    def finish(self, request: Request) -> str:
        """End a request and forget it: return the text held back, empty after a stop text."""
        ...
