"""What a quantized checkpoint depends on, told by content, so that equal work is done once."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.checkpoints.model_folder import ModelFolder
from engine.quantize.options import WriteOptions

# Raised whenever the same inputs give another checkpoint than before.
ALGORITHM_VERSION = 1
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt")
# Of each shard its beginning (with all names, shapes and dtypes) and pieces all over are read:
# fine-tuning changes every matrix, and reading a model whole would take minutes at each start.
_HEAD_BYTES = 1 << 20
_PIECE_BYTES = 1 << 16
_PIECES = 64


@dataclass(frozen=True, slots=True)
class ContentKey:
    """SHA-256 of each thing that the result depends on; `digest` is of them all."""

    model: str
    options: str
    calibration: str
    algorithm: int = ALGORITHM_VERSION

    @property
    def digest(self) -> str:
        """One hash, in hexadecimal."""
        return _hash(json.dumps(asdict(self), sort_keys=True).encode())

    def difference(self, other: ContentKey) -> str:
        """What differs between two keys, for people: "the options"; empty if nothing does."""
        names = {
            "model": "the model",
            "options": "the options",
            "calibration": "the calibration text",
            "algorithm": "the program's version",
        }
        mine, others = asdict(self), asdict(other)
        return ", ".join(text for name, text in names.items() if mine[name] != others[name])


def content_key(folder: ModelFolder, options: WriteOptions, text: str) -> ContentKey:
    """The key of quantizing the model in `folder`; `text` counts only where it is used."""
    return ContentKey(
        model=model_fingerprint(folder),
        options=_hash(json.dumps(options.to_json(), sort_keys=True).encode()),
        calibration=_hash(text.encode()) if options.calibrated else "",
    )


def model_fingerprint(folder: ModelFolder) -> str:
    """SHA-256 of a folder's config, its tokenizer and pieces of its weights."""
    digest = hashlib.sha256(json.dumps(folder.config, sort_keys=True).encode())
    for name in _TOKENIZER_FILES:
        path = folder.path / name
        if path.is_file():
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    for shard in sorted(folder.path.glob("*.safetensors")):
        if shard.is_file():  # a link may lead nowhere
            _add_pieces(digest, shard)
    return digest.hexdigest()


def _add_pieces(digest: hashlib._Hash, shard: Path) -> None:
    size = shard.stat().st_size
    digest.update(f"{shard.name}:{size}".encode())
    with shard.open("rb") as file:
        if size <= _HEAD_BYTES + _PIECES * _PIECE_BYTES:
            digest.update(file.read())
            return
        digest.update(file.read(_HEAD_BYTES))
        step = (size - _PIECE_BYTES - _HEAD_BYTES) / (_PIECES - 1)
        for piece in range(_PIECES):
            file.seek(_HEAD_BYTES + round(piece * step))
            digest.update(file.read(_PIECE_BYTES))


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
