"""The tokenizer in a GGUF file's metadata, built with the `tokenizers` library.

Two kinds are read: byte-level BPE ("gpt2"), whose merges are in the file, and SentencePiece BPE
("llama"), whose merges follow from the pieces' scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from engine.errors import ModelError

_PREFIX = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_SPACE = "▁"  # SentencePiece's mark of a space
# Characters of a piece that merges are looked for in: every cut is tried, and trained pieces have
# tens at most.
_LONGEST_PIECE = 512

# How text is cut before merging, by `tokenizer.ggml.pre`. The patterns are those of the models'
# own tokenizers.
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {
    "llama-bpe": _LLAMA3_PATTERN,
    "llama3": _LLAMA3_PATTERN,
    "llama-v3": _LLAMA3_PATTERN,
    "qwen2": _LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}"),
}
_BYTE_LEVEL = ("default", "gpt-2")
_DIGITS_FIRST = ("smollm", "starcoder", "codeshell")
# Kinds that begin a text with the beginning token unless the file says otherwise.
_BEGINS = ("llama-bpe", "llama3", "llama-v3")


def gguf_tokenizer(metadata: Mapping[str, Any], path: Path) -> tokenizers.Tokenizer:
    """Build the tokenizer that a file describes; `path` is for messages.

    Raises:
        ModelError: it holds none, or one of a kind that is not read.
    """
    kind = metadata.get(f"{_PREFIX}model")
    pieces = metadata.get(f"{_PREFIX}tokens")
    if not isinstance(pieces, list) or not pieces or not all(isinstance(p, str) for p in pieces):
        raise ModelError(
            f"{path} holds no tokenizer: put the model's tokenizer.json beside it, name its folder "
            "with the knob tokenizer, or send prompts as token ids"
        )
    kinds = metadata.get(f"{_PREFIX}token_type", [_NORMAL] * len(pieces))
    if not isinstance(kinds, list) or len(kinds) != len(pieces):
        raise ModelError(f"{path}: tokenizer.ggml.token_type must list {len(pieces)} types")
    vocabulary = _vocabulary(pieces)
    try:
        if kind == "gpt2":
            backend, begins = _byte_level(metadata, vocabulary, path)
        elif kind == "llama":
            backend, begins = _sentencepiece(metadata, pieces, kinds, vocabulary, path)
        else:
            raise ModelError(
                f"{path}: tokenizer of kind {kind!r} is not read (gpt2 and llama are): put the "
                "model's tokenizer.json beside the file"
            )
        _add_special(backend, pieces, kinds)
        _add_ends(backend, metadata, pieces, begins)
    except ModelError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{path}: the tokenizer in the file is broken: {error}") from error
    return backend


def _vocabulary(pieces: list[str]) -> dict[str, int]:
    """Ids by piece; a piece that comes again keeps its first id."""
    vocabulary: dict[str, int] = {}
    for index, piece in enumerate(pieces):
        # Bytes that are no UTF-8 cannot be typed; they need an entry of their own all the same.
        text = piece.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        vocabulary.setdefault(text, index)
    return vocabulary


def _byte_level(
    metadata: Mapping[str, Any], vocabulary: dict[str, int], path: Path
) -> tuple[tokenizers.Tokenizer, bool]:
    merges = metadata.get(f"{_PREFIX}merges")
    if not isinstance(merges, list):
        raise ModelError(f"{path}: tokenizer.ggml.merges is missing")
    pairs: list[tuple[str, str]] = []
    for merge in merges:
        left, _, right = str(merge).partition(" ")
        pairs.append((left, right))
    cut = metadata.get(f"{_PREFIX}pre", "default")
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=cut in _BEGINS))
    whole: pre_tokenizers.PreTokenizer
    if cut in _PATTERNS:
        if cut == "qwen2":
            backend.normalizer = normalizers.NFC()
        whole = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_PATTERNS[cut]), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    elif cut in _BYTE_LEVEL:
        whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif cut in _DIGITS_FIRST:
        whole = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    else:
        known = ", ".join((*_BYTE_LEVEL, *_DIGITS_FIRST, *_PATTERNS))
        raise ModelError(
            f"{path}: tokenizer.ggml.pre {cut!r} is not read (these are: {known}): put the model's "
            "tokenizer.json beside the file"
        )
    backend.pre_tokenizer = whole
    backend.decoder = decoders.ByteLevel()
    return backend, cut in _BEGINS


def _sentencepiece(
    metadata: Mapping[str, Any],
    pieces: list[str],
    kinds: list[int],
    vocabulary: dict[str, int],
    path: Path,
) -> tuple[tokenizers.Tokenizer, bool]:
    scores = metadata.get(f"{_PREFIX}scores")
    if not isinstance(scores, list) or len(scores) != len(pieces):
        raise ModelError(f"{path}: tokenizer.ggml.scores must list {len(pieces)} scores")
    unknown = next((p for p, k in zip(pieces, kinds, strict=True) if k == _UNKNOWN), None)
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocabulary,
            _merges(vocabulary, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    marks: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
    strip: list[decoders.Decoder] = []
    if metadata.get(f"{_PREFIX}add_space_prefix", True):
        marks.insert(0, normalizers.Prepend(_SPACE))
        strip.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(marks)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend, True


def _merges(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece merges the pair whose joined piece scores highest; so merges are by score."""
    found: list[tuple[float, int, int, tuple[str, str]]] = []
    for piece, index in vocabulary.items():
        for cut in range(1, len(piece) if len(piece) <= _LONGEST_PIECE else 0):
            left, right = vocabulary.get(piece[:cut]), vocabulary.get(piece[cut:])
            if left is not None and right is not None:
                found.append((-scores[index], left, right, (piece[:cut], piece[cut:])))
    return [pair for _, _, _, pair in sorted(found)]


def _add_special(backend: tokenizers.Tokenizer, pieces: list[str], kinds: list[int]) -> None:
    special = [
        AddedToken(piece, special=kind != _USER_DEFINED, normalized=False)
        for piece, kind in zip(pieces, kinds, strict=True)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) and piece
    ]
    backend.add_tokens(special)


def _add_ends(
    backend: tokenizers.Tokenizer, metadata: Mapping[str, Any], pieces: list[str], begins: bool
) -> None:
    """Put the beginning and the ending token around a text where the file asks for them."""
    ends = {"bos": begins, "eos": False}
    added: dict[str, tuple[str, int]] = {}
    for key, by_default in ends.items():
        token = metadata.get(f"{_PREFIX}{key}_token_id")
        wanted = metadata.get(f"{_PREFIX}add_{key}_token", by_default)
        if wanted and type(token) is int and 0 <= token < len(pieces):
            added[key] = (pieces[token], token)
    if not added:
        return
    first, last = added.get("bos"), added.get("eos")
    template: list[str] = ["$A"]
    if first is not None:
        template.insert(0, first[0])
    if last is not None:
        template.append(last[0])
    backend.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=list(dict.fromkeys(added.values()))
    )
