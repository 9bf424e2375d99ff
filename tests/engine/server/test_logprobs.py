"""Single tokens as texts, in vocabularies of both kinds."""

from __future__ import annotations

import json
import math

import pytest
import tokenizers

from engine.request import TokenLogprobs
from engine.server.logprobs import CompletionLogprobs, TokenTexts, chat_logprobs
from engine.tokenizer import Tokenizer
from tests.engine.tiny_tokenizers import byte_level, sentencepiece

TEXT = "the naïve 🙂 in a café"


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_bytes_of_tokens_make_the_text(make: type[tokenizers.Tokenizer]) -> None:
    tokenizer = Tokenizer(make())
    texts = TokenTexts(tokenizer)
    read = [texts.read(i) for i in tokenizer.encode(TEXT)]
    assert bytes(b for _, content in read for b in content).decode().strip() == TEXT
    for text, content in read:
        assert text == bytes(content).decode("utf-8", "replace")


def test_special_and_unknown_tokens() -> None:
    tokenizer = Tokenizer(byte_level())
    texts = TokenTexts(tokenizer)
    assert texts.read(1) == ("</s>", list(b"</s>"))
    assert texts.read(10**6) == ("", [])
    for without in (TokenTexts(None), TokenTexts(tokenizer, as_ids=True)):
        assert without.read(7)[0] == "token_id:7"


def test_what_cannot_be_is_a_number_json_has() -> None:
    texts = TokenTexts(None)
    at = TokenLogprobs(3, -math.inf, {4: -0.5, 3: -math.inf, 5: math.nan})
    completion = CompletionLogprobs(texts).write([at])
    chat = chat_logprobs([at], texts)
    for written in (completion, chat):
        json.dumps(written, allow_nan=False)
    assert completion["token_logprobs"] == [-9999.0]
    assert chat["content"][0]["logprob"] == -9999.0


def test_of_two_tokens_that_read_alike_the_likelier_counts() -> None:
    tokenizer = Tokenizer(byte_level())
    halves = [i for i in range(2, 300) if TokenTexts(tokenizer).read(i)[0] == "\ufffd"][:2]
    at = TokenLogprobs(halves[1], -2.0, {halves[0]: -1.0, halves[1]: -2.0})
    (top,) = CompletionLogprobs(TokenTexts(tokenizer)).write([at])["top_logprobs"]
    assert top == {"\ufffd": -1.0}


def test_offsets_go_on_from_chunk_to_chunk() -> None:
    writer = CompletionLogprobs(TokenTexts(None))
    tokens = [TokenLogprobs(i, -1.0, {}) for i in (5, 12, 7)]
    offsets = writer.write(tokens[:2])["text_offset"] + writer.write(tokens[2:])["text_offset"]
    assert offsets == [0, 10, 21]
