"""The stream of text is the one-shot decode; stop texts are found wherever tokens split them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.detokenizer import StreamDetokenizer
from engine.request import Request, SamplingParams
from engine.tokenizer import Tokenizer
from tests.engine.tiny_tokenizers import byte_level, sentencepiece

BYTE_LEVEL = Tokenizer(byte_level())
SENTENCEPIECE = Tokenizer(sentencepiece())
texts = st.text(
    st.one_of(st.sampled_from("ab the.\n"), st.characters(exclude_categories=("Cs",))), max_size=60
)


def stream(
    tokenizer: Tokenizer, tokens: list[int], stop: tuple[str, ...] = (), min_tokens: int = 0
) -> tuple[list[str], int | None]:
    """The texts in order, one per token and one for the end; and where a stop text ended it."""
    request = Request(
        "r", [0], SamplingParams(stop=stop, min_tokens=min_tokens, max_tokens=None), 0.0
    )
    detokenizer = StreamDetokenizer(tokenizer)
    detokenizer.add(request)
    parts = []
    for count, token in enumerate(tokens, start=1):
        delta = detokenizer.append(request, [token])
        parts.append(delta.text)
        if delta.stop_at is not None:
            assert delta.stop_at == 1
            assert detokenizer.finish(request) == ""
            return parts, count
    parts.append(detokenizer.finish(request))
    return parts, None


@given(st.lists(st.integers(0, BYTE_LEVEL.vocab_size + 3), max_size=80))
def test_any_tokens_of_a_byte_level_vocabulary(tokens: list[int]) -> None:
    """Broken UTF-8, special, added and unknown tokens included."""
    parts, _ = stream(BYTE_LEVEL, tokens)
    assert "".join(parts) == BYTE_LEVEL.decode(tokens)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE])
@given(text=texts)
def test_tokens_of_any_text(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    parts, _ = stream(tokenizer, tokens)
    assert "".join(parts) == tokenizer.decode(tokens)


@given(text=texts, special=st.lists(st.integers(0, 60), max_size=12))
def test_special_tokens_anywhere_leave_spaces_as_they_are(text: str, special: list[int]) -> None:
    tokens = SENTENCEPIECE.encode(text)
    for place in special:
        tokens.insert(min(place, len(tokens)), 2)
    tokens = [2] * 12 + tokens
    parts, _ = stream(SENTENCEPIECE, tokens)
    assert "".join(parts) == SENTENCEPIECE.decode(tokens)


def test_unfinished_characters_are_held_back() -> None:
    tokens = [BYTE_LEVEL._backend.token_to_id(c) for c in "ð" + "Ł" + "ļ" + "Ģ"]  # 🜀 in bytes
    assert None not in tokens
    parts, _ = stream(BYTE_LEVEL, tokens)
    assert parts[:3] == ["", "", ""]
    assert "".join(parts) == BYTE_LEVEL.decode(tokens)
    assert len("".join(parts)) == 1
    unfinished, _ = stream(BYTE_LEVEL, tokens[:2])
    assert unfinished == ["", "", "\ufffd"]


@settings(max_examples=300)
@given(
    text=st.text("ab \nü🙂", max_size=40),
    stops=st.lists(st.text("ab \nü🙂", min_size=1, max_size=6), min_size=1, max_size=3),
    min_tokens=st.sampled_from([0, 0, 3, 10]),
)
def test_stop_texts(text: str, stops: list[str], min_tokens: int) -> None:
    """Against the plain definition: the first token after which a stop text stands complete."""
    tokens = BYTE_LEVEL.encode(text)
    parts, stopped = stream(BYTE_LEVEL, tokens, tuple(stops), min_tokens)
    before, expected = "", None
    for count in range(1, len(tokens) + 1):
        now = BYTE_LEVEL.decode(tokens[:count]).removesuffix("\ufffd")
        if count >= min_tokens:
            places = [now.find(s, max(len(before) - len(s) + 1, 0)) for s in stops]
            places = [at for at in places if at >= 0]
            if places:
                expected = (count, now[: min(places)])
                break
        before = now
    if expected is None:
        assert stopped is None
        assert "".join(parts) == text
    else:
        assert stopped == expected[0]
        assert "".join(parts) == expected[1]


def test_several_tokens_at_once_stop_at_the_one_that_completes() -> None:
    tokens = BYTE_LEVEL.encode("hello STOP more")
    request = Request("r", [0], SamplingParams(stop="STOP"), 0.0)
    detokenizer = StreamDetokenizer(BYTE_LEVEL)
    detokenizer.add(request)
    delta = detokenizer.append(request, tokens)
    assert delta.text == "hello "
    assert delta.stop_at is not None
    assert "STOP" in BYTE_LEVEL.decode(tokens[: delta.stop_at])
    assert "STOP" not in BYTE_LEVEL.decode(tokens[: delta.stop_at - 1])


def test_what_may_become_a_stop_text_is_shown_when_it_does_not() -> None:
    tokens = BYTE_LEVEL.encode("aSTaSTOaST")
    parts, stopped = stream(BYTE_LEVEL, tokens, ("STOP",))
    assert stopped is None
    assert "".join(parts) == "aSTaSTOaST"
    assert parts[-1] == "ST"


def test_requests_do_not_mix_and_are_forgotten() -> None:
    detokenizer = StreamDetokenizer(BYTE_LEVEL)
    requests = [Request(name, [0], SamplingParams(), 0.0) for name in "ab"]
    texts_of = ["first text", "zwölf Boxkämpfer 🙂"]
    for request in requests:
        detokenizer.add(request)
    tokens = [BYTE_LEVEL.encode(text) for text in texts_of]
    out = ["", ""]
    for step in range(max(map(len, tokens))):
        for i, request in enumerate(requests):
            if step < len(tokens[i]):
                out[i] += detokenizer.append(request, [tokens[i][step]]).text
    for i, request in enumerate(requests):
        out[i] += detokenizer.finish(request)
    assert out == texts_of
    assert not detokenizer._streams
