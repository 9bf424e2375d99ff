"""Log-probabilities as OpenAI's two APIs write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.request import TokenLogprobs
from engine.tokenizer import Tokenizer

# JSON has no infinity; vLLM writes this for a token that cannot be.
_LEAST = -9999.0
_SPACE = "▁"  # SentencePiece's mark of a space


class TokenTexts:
    """What single tokens read as.

    Args:
        tokenizer: None writes every token as `token_id:7`.
        as_ids: the same with a tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer | None, as_ids: bool = False) -> None:
        self._tokenizer = None if as_ids else tokenizer
        self._known: dict[int, tuple[str, list[int]]] = {}

    def read(self, token_id: int) -> tuple[str, list[int]]:
        """A token's text and its bytes in UTF-8; of a part of a character, the bytes tell more."""
        found = self._known.get(token_id)
        if found is None:
            found = self._known[token_id] = self._read(token_id)
        return found

    def _read(self, token_id: int) -> tuple[str, list[int]]:
        tokenizer = self._tokenizer
        if tokenizer is None:
            text = f"token_id:{token_id}"
            return text, list(text.encode())
        piece = tokenizer.piece(token_id)
        if piece is None:  # the model's vocabulary is padded past the tokenizer's
            return "", []
        content = piece.encode()
        if not tokenizer.is_special(token_id):
            if tokenizer.byte_level:
                content = tokenizer.token_bytes(token_id)
            elif len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                content = bytes.fromhex(piece[3:5])
            else:
                content = piece.replace(_SPACE, " ").encode()
        return content.decode("utf-8", "replace"), list(content)


def _number(logprob: float) -> float:
    return logprob if logprob > _LEAST else _LEAST


class CompletionLogprobs:
    """Log-probabilities of one output of /v1/completions; offsets go on from chunk to chunk.

    Args:
        texts: reads tokens.
    """

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._offset = 0

    def write(self, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """The object for these tokens, which follow those of the calls before."""
        tokens, offsets, top = [], [], []
        for at in logprobs:
            text, _ = self._texts.read(at.token_id)
            tokens.append(text)
            offsets.append(self._offset)
            self._offset += len(text)
            likeliest: dict[str, float] = {}
            for token_id, logprob in at.top.items():  # of two that read alike, the likelier
                likeliest.setdefault(self._texts.read(token_id)[0], _number(logprob))
            likeliest.setdefault(text, _number(at.logprob))
            top.append(likeliest)
        return {
            "text_offset": offsets,
            "token_logprobs": [_number(at.logprob) for at in logprobs],
            "tokens": tokens,
            "top_logprobs": top,
        }


def chat_logprobs(logprobs: Sequence[TokenLogprobs], texts: TokenTexts) -> dict[str, Any]:
    """Log-probabilities of tokens of a chat's output."""
    content = []
    for at in logprobs:
        top = [_entry(token_id, logprob, texts) for token_id, logprob in at.top.items()]
        content.append({**_entry(at.token_id, at.logprob, texts), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _entry(token_id: int, logprob: float, texts: TokenTexts) -> dict[str, Any]:
    text, content = texts.read(token_id)
    return {"token": text, "logprob": _number(logprob), "bytes": content}
