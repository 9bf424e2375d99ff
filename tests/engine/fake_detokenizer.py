"""Text of tokens in the simplest way: each token is two letters, so that texts cross tokens."""

from __future__ import annotations

from collections.abc import Sequence

from engine.output import TextDelta
from engine.request import Request


def letters(token: int) -> str:
    return chr(97 + token % 5) + chr(97 + token // 5)


def as_text(tokens: Sequence[int]) -> str:
    return "".join(map(letters, tokens))


class FakeDetokenizer:
    """Keeps all text and searches it anew each time; holds back what could begin a stop text."""

    def __init__(self) -> None:
        self.open: dict[Request, tuple[str, int, int]] = {}  # text, shown, tokens
        self.finished = 0

    def add(self, request: Request) -> None:
        assert request not in self.open
        self.open[request] = ("", 0, 0)

    def append(self, request: Request, token_ids: Sequence[int]) -> TextDelta:
        text, shown, count = self.open[request]
        for i, token in enumerate(token_ids):
            text += letters(token)
            count += 1
            if count < request.sampling.min_tokens:
                continue
            ends = [
                text.find(stop, max(0, 2 * count - 1 - len(stop))) for stop in request.sampling.stop
            ]
            found = [at for at in ends if at >= 0]
            if found:
                delta = text[shown : max(shown, min(found))]
                self.open[request] = (text, len(text), count)
                return TextDelta(delta, i + 1)
        safe = max(shown, len(text) - max((len(s) - 1 for s in request.sampling.stop), default=0))
        self.open[request] = (text, safe, count)
        return TextDelta(text[shown:safe])

    def finish(self, request: Request) -> str:
        text, shown, _ = self.open.pop(request)
        self.finished += 1
        return text[shown:]
