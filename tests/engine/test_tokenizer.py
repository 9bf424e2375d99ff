"""Loading tokenizers from folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import ModelError
from engine.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from tests.engine.tiny_tokenizers import byte_level, sentencepiece


def test_round_trip(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    text = "The quick ünïcödé 🚀 fox\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.byte_level
    assert not Tokenizer(sentencepiece()).byte_level


def test_token_bytes_join_to_the_text() -> None:
    tokenizer = Tokenizer(byte_level())
    text = "naïve <tool call ü> 🙂 x"
    ids = tokenizer.encode(text)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text
    assert tokenizer.token_bytes(0) == b""  # special
    assert tokenizer.token_bytes(10**6) == b""  # unknown


def test_none(tmp_path: Path) -> None:
    assert not has_tokenizer(tmp_path)
    with pytest.raises(ModelError, match=r"has no tokenizer\.json: copy"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"model": 3}'])
def test_broken(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json is not a valid tokenizer"):
        load_tokenizer(tmp_path)


def test_older_format_that_does_not_convert(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"junk")
    with pytest.raises(ModelError, match=r"tokenizer\.model cannot be converted"):
        load_tokenizer(tmp_path)
