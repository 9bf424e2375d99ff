"""Tokenizers rebuilt from GGUF metadata encode and decode as the ones they came from."""

import json
from pathlib import Path

import pytest
import tokenizers

from autotune.embedded import TARGET
from engine.checkpoints.gguf.tokenizer import gguf_tokenizer
from engine.errors import ModelError

PATH = Path("model.gguf")
TEXTS = [
    "def main():\n    return {'a': 1}  # naïve\n",
    "  Two spaces, tabs\tand 12345 numbers; ünïcode 日本語 🎉.",
    "",
    "a",
    "\n\n\n",
    "It's we'll I'd",
]
CONTROL, NORMAL, UNKNOWN, BYTE = 3, 1, 2, 6


def embedded_metadata() -> dict[str, object]:
    """The embedded model's byte-level tokenizer as a GGUF file holds it."""
    stored = json.loads((TARGET / "tokenizer.json").read_text())
    ids = tokenizers.Tokenizer.from_file(str(TARGET / "tokenizer.json")).get_vocab()
    pieces = sorted(ids, key=ids.__getitem__)
    special = {token["content"] for token in stored["added_tokens"]}
    merges = [m if isinstance(m, str) else " ".join(m) for m in stored["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [CONTROL if p in special else NORMAL for p in pieces],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": ids["<|begin_of_text|>"],
        "tokenizer.ggml.eos_token_id": ids["<|end_of_text|>"],
        "tokenizer.ggml.add_bos_token": True,
    }


def test_byte_level_bpe_is_the_original():
    original = tokenizers.Tokenizer.from_file(str(TARGET / "tokenizer.json"))
    rebuilt = gguf_tokenizer(embedded_metadata(), PATH)
    for text in [*TEXTS, "<|begin_of_text|>x<|end_of_text|>"]:
        assert rebuilt.encode(text).ids == original.encode(text).ids
        ids = original.encode(text).ids
        assert rebuilt.decode(ids) == original.decode(ids)


@pytest.mark.parametrize("cut", ["llama-bpe", "qwen2", "smollm"])
def test_other_ways_of_cutting_lose_no_text(cut):
    rebuilt = gguf_tokenizer({**embedded_metadata(), "tokenizer.ggml.pre": cut}, PATH)
    for text in TEXTS:
        assert rebuilt.decode(rebuilt.encode(text).ids) == text


def test_numbers_are_cut_as_the_family_cuts_them():
    numbers = {}
    for cut in ("llama-bpe", "qwen2"):
        rebuilt = gguf_tokenizer({**embedded_metadata(), "tokenizer.ggml.pre": cut}, PATH)
        pieces = rebuilt.pre_tokenizer.pre_tokenize_str("a12345")
        numbers[cut] = [piece for piece, _ in pieces]
    assert numbers == {"llama-bpe": ["a", "123", "45"], "qwen2": ["a", *"12345"]}


def sentencepiece(tmp_path: Path) -> tuple[tokenizers.Tokenizer, dict[str, object]]:
    """A small SentencePiece-like BPE and its pieces with scores, as a GGUF file holds them."""
    trained = tokenizers.SentencePieceBPETokenizer()
    trained.train_from_iterator([" ".join(TEXTS), "the cat the dog the tree"] * 3, vocab_size=150)
    trained.save(str(tmp_path / "t.json"))
    stored = json.loads((tmp_path / "t.json").read_text())
    vocabulary: dict[str, int] = stored["model"]["vocab"]
    order = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = stored["model"]["merges"]
    joined = {"".join(m if isinstance(m, list) else m.split(" ")): -i for i, m in enumerate(merges)}
    pieces = order + [f"<0x{byte:02X}>" for byte in range(256)]
    metadata: dict[str, object] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [float(joined.get(p, -1e6)) for p in pieces],
        "tokenizer.ggml.token_type": [
            UNKNOWN if p == "<unk>" else BYTE if p.startswith("<0x") else NORMAL for p in pieces
        ],
        "tokenizer.ggml.add_bos_token": False,
    }
    return tokenizers.Tokenizer.from_file(str(tmp_path / "t.json")), metadata


def test_sentencepiece_merges_follow_from_the_scores(tmp_path):
    original, metadata = sentencepiece(tmp_path)
    rebuilt = gguf_tokenizer(metadata, PATH)
    for text in ["the cat", "the dog the tree", "def main return"]:
        assert rebuilt.encode(text).tokens == original.encode(text).tokens
        assert rebuilt.decode(rebuilt.encode(text).ids) == text


def test_a_piece_of_a_million_characters_takes_no_time(tmp_path):
    original, metadata = sentencepiece(tmp_path)
    for name, value in (("tokens", "x" * 10**6), ("scores", 0.0), ("token_type", NORMAL)):
        metadata[f"tokenizer.ggml.{name}"].append(value)
    rebuilt = gguf_tokenizer(metadata, PATH)
    assert rebuilt.encode("the cat").tokens == original.encode("the cat").tokens


def test_bytes_stand_for_what_no_piece_spells(tmp_path):
    rebuilt = gguf_tokenizer(sentencepiece(tmp_path)[1], PATH)
    encoded = rebuilt.encode("the Ω")
    assert "<0xCE>" in encoded.tokens
    assert rebuilt.decode(encoded.ids) == "the Ω"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.tokens": None}, "holds no tokenizer"),
        ({"tokenizer.ggml.model": "bert"}, "kind 'bert' is not read"),
        ({"tokenizer.ggml.pre": "tekken"}, "pre 'tekken' is not read"),
        ({"tokenizer.ggml.merges": None}, "merges is missing"),
        ({"tokenizer.ggml.merges": ["nonsense merges"]}, "is broken"),
        ({"tokenizer.ggml.token_type": [1, 2]}, "token_type must list"),
    ],
)
def test_what_cannot_be_built_is_told(changes, message):
    with pytest.raises(ModelError, match=message):
        gguf_tokenizer({**embedded_metadata(), **changes}, PATH)
