"""The tokenizer of a model folder: text to ids and back; local files only, no remote code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from engine.checkpoints.gguf.file import GgufFile
from engine.checkpoints.gguf.find import find_gguf
from engine.checkpoints.gguf.tokenizer import gguf_tokenizer
from engine.errors import ModelError

_OLDER_FILES = ("tokenizer.model", "vocab.json", "vocab.txt")


def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary.

    Bytes that print are themselves; the others are shifted past 255 in order (Radford et al. 2019,
    GPT-2's `bytes_to_unicode`).
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    shifted = (b for b in range(256) if b not in printable)
    alphabet = {chr(b): b for b in printable}
    alphabet.update({chr(256 + i): b for i, b in enumerate(shifted)})
    return alphabet


class Tokenizer:
    """Encodes prompts and decodes outputs with the `tokenizers` library."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._special = {i for i, token in added.items() if token.special}
        decoder = json.loads(backend.to_str()).get("decoder") or {}
        self.byte_level = decoder.get("type") == "ByteLevel"
        self._alphabet = _byte_alphabet()
        self._bytes: dict[int, bytes] = {}

    @property
    def vocab_size(self) -> int:
        """Token ids are below this, added tokens included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt, with the special tokens that the tokenizer adds by itself.

        Special tokens that the text itself spells are theirs either way.
        """
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of whole token ids; special tokens are left out unless they are asked for."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def piece(self, token_id: int) -> str | None:
        """A token as the vocabulary spells it; None if there is none."""
        piece: str | None = self._backend.id_to_token(token_id)
        return piece

    def is_special(self, token_id: int) -> bool:
        """Whether a token is left out of texts."""
        return token_id in self._special

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes that a token adds, if `byte_level`; none for special and unknown tokens."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._read_bytes(token_id)
        return found

    def _read_bytes(self, token_id: int) -> bytes:
        token = None if token_id in self._special else self._backend.id_to_token(token_id)
        if token is None:
            return b""
        try:
            return bytes(self._alphabet[char] for char in token)
        except KeyError:  # an added token is written as it reads
            return str(token).encode()


def has_tokenizer(path: str | Path) -> bool:
    """Whether a folder, or a GGUF file, holds a tokenizer in some format."""
    folder = Path(path).expanduser()
    if any((folder / name).is_file() for name in ("tokenizer.json", *_OLDER_FILES)):
        return True
    gguf = find_gguf(folder)
    return gguf is not None and "tokenizer.ggml.tokens" in GgufFile(gguf).metadata


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a folder's tokenizer: `tokenizer.json`, or what converts to it, or a GGUF file's own.

    Raises:
        ModelError: there is none, or it is broken.
    """
    folder = Path(path).expanduser()
    file = folder / "tokenizer.json"
    if file.is_file():
        try:
            return Tokenizer(tokenizers.Tokenizer.from_file(str(file)))
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"{file} is not a valid tokenizer: {error}") from error
    older = [name for name in _OLDER_FILES if (folder / name).is_file()]
    if older:
        return _convert(folder, older[0])
    gguf = find_gguf(folder)
    if gguf is not None:
        return Tokenizer(gguf_tokenizer(GgufFile(gguf).metadata, gguf))
    raise ModelError(
        f"{folder} has no tokenizer.json: copy the model's tokenizer there, name its folder with "
        "the knob tokenizer, or send prompts as token ids"
    )


def _convert(folder: Path, found: str) -> Tokenizer:
    # Imported here: it takes seconds, and few folders lack tokenizer.json.
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        return Tokenizer(loaded.backend_tokenizer)
    except Exception as error:  # anything may go wrong in a conversion; the cause is told
        raise ModelError(
            f"{folder / found} cannot be converted to a tokenizer.json: {error}"
        ) from error
