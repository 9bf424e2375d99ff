"""A checkpoint that grows shard by shard, and whose finished shards outlive an interruption.

Shards are written to temporary names, forced to the disk and renamed; then the progress file says
that they are there. `config.json` comes last: until then the folder is not a model.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.checkpoints.safetensors_files import INDEX_FILE
from engine.errors import ConfigError, EnvironmentLacks
from engine.quantize.compressed_tensors import Scheme
from engine.quantize.content_key import ContentKey

PROGRESS_FILE = ".quantize-progress.json"
_TEMPORARY = ".writing-"


@dataclass(slots=True)
class Shard:
    """A finished shard: the schemes of the layers in it (None: floats), and notes on them.

    `size` is the file's and `nbytes` its tensors', in bytes.
    """

    size: int
    nbytes: int
    schemes: dict[str, Scheme | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class ShardWriter:
    """Writes `count` shards into `folder`, in order; picks up those of an interrupted run.

    Raises:
        ConfigError: the folder holds the progress of something else (told what).
        EnvironmentLacks: the folder cannot be written.
    """

    def __init__(self, folder: Path, count: int, key: ContentKey) -> None:
        self.folder = folder
        self.count = count
        self._key = key
        self.shards: list[Shard] = []
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f"{_TEMPORARY}*"):
                left.unlink()
            self._read_progress()

    def path(self, number: int) -> Path:
        """Where shard `number`, from 0 on, is or will be."""
        return self.folder / f"model-{number + 1:05d}-of-{self.count:05d}.safetensors"

    def add(
        self,
        tensors: Mapping[str, Tensor],
        schemes: Mapping[str, Scheme | None] | None = None,
        notes: list[str] | None = None,
    ) -> None:
        """Write the next shard.

        Raises:
            EnvironmentLacks: the disk is full, or cannot be written.
        """
        path = self.path(len(self.shards))
        temporary = self.folder / f"{_TEMPORARY}{path.name}"
        with disk_errors(self.folder):
            try:
                owned = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
                save_file(owned, temporary, metadata={"format": "pt"})
                temporary.chmod(0o644)  # safetensors makes it private; a model is passed on
                _force(temporary)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
            nbytes = sum(tensor.nbytes for tensor in owned.values())
            self.shards.append(
                Shard(path.stat().st_size, nbytes, dict(schemes or {}), list(notes or ()))
            )
            self._write_progress()

    def weight_map(self) -> dict[str, str]:
        """The finished shards' file by tensor."""
        found = {}
        for number in range(len(self.shards)):
            path = self.path(number)
            with safe_open(path, framework="pt") as file:
                found.update(dict.fromkeys(file.keys(), path.name))
        return found

    def finish(self, config: Mapping[str, Any]) -> None:
        """Write the index and, last of all, `config.json`; the progress stays, see below.

        Raises:
            EnvironmentLacks: as `add`.
        """
        assert len(self.shards) == self.count
        total = sum(shard.nbytes for shard in self.shards)
        index = {"metadata": {"total_size": total}, "weight_map": self.weight_map()}
        with disk_errors(self.folder):
            write_json(self.folder / INDEX_FILE, index)
            write_json(self.folder / "config.json", config)

    def _read_progress(self) -> None:
        path = self.folder / PROGRESS_FILE
        if not path.is_file():
            return
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            key = ContentKey(**values["key"])
            shards = [_shard(entry) for entry in values["shards"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} is broken ({error}): remove the folder and start again"
            ) from error
        if key != self._key:
            raise ConfigError(
                f"{self.folder} holds the beginning of another quantization: "
                f"{self._key.difference(key)} changed since; go on with what it was begun with, or "
                "choose another folder with -o"
            )
        for number, shard in enumerate(shards):
            file = self.path(number)
            if not file.is_file() or file.stat().st_size != shard.size:
                break  # lost or cut off: again from here on
            self.shards.append(shard)

    def _write_progress(self) -> None:
        write_json(
            self.folder / PROGRESS_FILE,
            {"key": asdict(self._key), "shards": [asdict(shard) for shard in self.shards]},
        )


def forget_progress(folder: Path) -> None:
    """Remove the progress file, once nothing is left to be done that it could help with."""
    (folder / PROGRESS_FILE).unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn what a full or forbidden disk raises into one sentence.

    Raises:
        EnvironmentLacks: instead of OSError and of the errors of safetensors.
    """
    try:
        yield
    except SafetensorError as error:
        text = str(error)
        full = "No space left" in text or "os error 28" in text
        raise EnvironmentLacks(_sentence(folder, full, text)) from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise EnvironmentLacks(_sentence(folder, full, error.strerror or str(error))) from error


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file under a temporary name, force it to the disk and rename it."""
    temporary = path.with_name(f"{_TEMPORARY}{path.name}")
    try:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        _force(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _sentence(folder: Path, full: bool, reason: str) -> str:
    if full:
        return (
            f"no space is left on the disk of {folder}: free some and go on, finished layers are "
            "kept, or choose a folder on another disk"
        )
    return f"{folder} cannot be written: {reason.lower()}; choose another folder"


def _force(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _shard(values: dict[str, Any]) -> Shard:
    schemes = {
        name: None if scheme is None else Scheme(**scheme)
        for name, scheme in values["schemes"].items()
    }
    return Shard(int(values["size"]), int(values["nbytes"]), schemes, list(values["notes"]))
