"""The container: header, metadata and the table of tensors of a GGUF file (versions 2 and 3).

Layout from the specification (ggml, docs/gguf.md): magic, version, counts, key-value pairs, tensor
infos, then the tensors' data, aligned. All little-endian. Nothing in the file is trusted: every
length is checked against what the file still holds before anything of that size is made.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.checkpoints.gguf.blocks import BLOCK_TYPES, BlockType
from engine.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MOST_DIMENSIONS = 4
# Codes of the scalar metadata types, with struct's letter; 8 is a string and 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS[12] = "d"
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: `shape` as PyTorch writes it, rows first; `offset` in the file."""

    name: str
    shape: tuple[int, ...]
    type: BlockType
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape[:-1]) * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one row; blocks run along the last dimension."""
        return self.shape[-1] // self.type.elements * self.type.bytes


class GgufFile:
    """An opened GGUF file; tensors are mapped when they are read.

    Raises:
        ModelError: not a GGUF file, truncated, of an unknown version or tensor type, or with
            lengths that the file does not hold.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                if not size:
                    raise ModelError(f"{path} is empty; a GGUF file is wanted")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
        cursor = _Cursor(path, self._map)
        magic = cursor.take(4)
        if magic != MAGIC:
            raise ModelError(f"{path} is not a GGUF file: it begins with {magic!r}, not {MAGIC!r}")
        version = cursor.number("I")
        if version not in VERSIONS:
            raise ModelError(
                f"{path} is of GGUF version {version}; versions "
                f"{' and '.join(map(str, VERSIONS))}, little-endian, are read"
            )
        num_tensors, num_keys = cursor.number("Q"), cursor.number("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(cursor.plausible(num_keys, 13, "metadata entries")):
            name = cursor.text()
            self.metadata[name] = cursor.value(cursor.number("I"), name)
        infos = [cursor.tensor_info() for _ in range(cursor.plausible(num_tensors, 24, "tensors"))]
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ModelError(f"{path}: general.alignment must be a power of two, got {alignment!r}")
        start = -(-cursor.position // alignment) * alignment
        self.tensors: dict[str, TensorInfo] = {}
        for info in infos:
            placed = TensorInfo(info.name, info.shape, info.type, start + info.offset)
            if placed.offset + placed.nbytes > len(self._map):
                raise ModelError(
                    f"{path} ({len(self._map)} bytes) is truncated: tensor {info.name!r} ends at "
                    f"byte {placed.offset + placed.nbytes}"
                )
            if info.name in self.tensors:
                raise ModelError(f"{path} holds tensor {info.name!r} twice")
            self.tensors[info.name] = placed

    def rows(self, info: TensorInfo) -> NDArray[np.uint8]:
        """The tensor's bytes, mapped: uint8 [rows, bytes of a row]."""
        data = np.frombuffer(self._map, np.uint8, info.nbytes, info.offset)
        return data.reshape(-1, info.row_bytes)

    def forget(self) -> None:
        """Let go of the pages that were read."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


class _Cursor:
    """Reads forward through the file, within its bounds."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self.position = 0

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self._data):
            raise ModelError(
                f"{self._path} ({len(self._data)} bytes) is truncated: its header goes on past the "
                "end"
            )
        taken = self._data[self.position : end]
        self.position = end
        return taken

    def number(self, letter: str) -> Any:
        return struct.unpack("<" + letter, self.take(struct.calcsize("<" + letter)))[0]

    def plausible(self, count: int, least_bytes: int, what: str) -> int:
        """`count`, unless the rest of the file cannot hold so many."""
        if count * least_bytes > len(self._data) - self.position:
            raise ModelError(
                f"{self._path} ({len(self._data)} bytes) is truncated or corrupt: its header "
                f"announces {count} {what}"
            )
        return count

    def text(self) -> str:
        raw = self.take(self.number("Q"))
        # Tokens may be any bytes; what is not UTF-8 must come back as it was.
        return raw.decode("utf-8", "surrogateescape")

    def value(self, kind: int, name: str) -> Any:
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise ModelError(f"{self._path}: metadata {name!r} is of unknown type {kind}")
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            return [self.text() for _ in range(self.plausible(count, 8, f"texts in {name!r}"))]
        if kind not in _SCALARS:
            raise ModelError(f"{self._path}: metadata {name!r} is an array of unknown type {kind}")
        letter = _SCALARS[kind]
        self.plausible(count, struct.calcsize(letter), f"values in {name!r}")
        return list(struct.unpack(f"<{count}{letter}", self.take(count * struct.calcsize(letter))))

    def tensor_info(self) -> TensorInfo:
        name = self.text()
        dimensions = self.number("I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise ModelError(f"{self._path}: tensor {name!r} has {dimensions} dimensions")
        # The file counts the fastest dimension first.
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        code, offset = self.number("I"), self.number("Q")
        block = BLOCK_TYPES.get(code)
        if block is None:
            known = ", ".join(t.name for t in BLOCK_TYPES.values())
            raise ModelError(
                f"{self._path}: tensor {name!r} is of GGUF type {code}, which is not read; these "
                f"are: {known}"
            )
        if min(shape) < 1 or shape[-1] % block.elements:
            raise ModelError(
                f"{self._path}: tensor {name!r} has shape {list(shape)}; {block.name} needs "
                f"rows of a multiple of {block.elements}"
            )
        return TensorInfo(name, shape, block, offset)
