"""Measured choices on disk: one JSON file for a kind of GPU and the versions of Triton and PyTorch.

`$XDG_CACHE_HOME/autotune/kernels/<device>-<capability>-triton<version>-torch<version>.json`. It is
replaced whole, so that no process sees half a file; who adds to it holds a lock, so that of two
processes that measure neither loses what it found. A file that cannot be read is told of once and
otherwise treated as absent: kernels then run with their defaults.
"""

import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from kernels.cpu.native_build import cache_folder, fcntl
from kernels.triton.runtime import DeviceFacts
from kernels.triton.tuning import Choice, Problem, TuningTable

SCHEMA_VERSION = 1
# Tens of thousands of problems; a longer file is none of ours.
LARGEST_FILE = 16 << 20


class TuningCacheWarning(UserWarning):
    """The file of measured choices cannot be used; the text says why and what follows."""


class _NotOurs(ValueError):
    """A file that is not what this module writes; the text says in what."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The best choice of a problem, its median seconds, and those of the default choice."""

    choice: Choice
    seconds: float
    default_seconds: float


def path_of(facts: DeviceFacts) -> Path:
    """Where the choices of such a device are, under the versions in use."""
    versions = _versions()
    name = (
        f"{facts.name}-{facts.capability[0]}.{facts.capability[1]}"
        f"-triton{versions['triton']}-torch{versions['torch']}"
    )
    return cache_folder() / "kernels" / (re.sub(r"[^A-Za-z0-9.+_-]+", "_", name) + ".json")


def load(facts: DeviceFacts) -> TuningTable:
    """What was measured on such a device; warns and gives an empty table where it cannot be read.

    Raises nothing: TuningCacheWarning says what is wrong with a file.
    """
    path = path_of(facts)
    try:
        found = _read(path, facts)
    except (OSError, _NotOurs) as problem:
        warnings.warn(
            f"the measured kernel choices in {path} are not used ({problem}): kernels run with "
            "their defaults until autotune doctor --tune-kernels replaces the file",
            TuningCacheWarning,
            stacklevel=2,
        )
        found = {}
    return TuningTable({problem: entry.choice for problem, entry in found.items()})


def store(problem: Problem, measured: Measured, facts: DeviceFacts) -> None:
    """Add one result to the file, keeping what other processes added.

    Raises OSError where the folder cannot be written.
    """
    path = path_of(facts)
    with _alone(path):
        try:
            found = _read(path, facts)
        except (OSError, _NotOurs):
            found = {}
        _write(path, {**found, problem: measured}, facts)


def entries(facts: DeviceFacts) -> dict[Problem, Measured]:
    """Everything in the file with its times; nothing where it cannot be read."""
    try:
        return _read(path_of(facts), facts)
    except (OSError, _NotOurs):
        return {}


def _versions() -> dict[str, str]:
    return {"triton": _triton_version(), "torch": str(torch.__version__)}


def _triton_version() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:  # a build that is on the path without being installed
        import triton

        return str(triton.__version__)


def _header(facts: DeviceFacts) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "device": facts.name,
        "capability": list(facts.capability),
        "multiprocessors": facts.multiprocessors,
        "shared_memory": facts.shared_memory,
        **_versions(),
    }


def _read(path: Path, facts: DeviceFacts) -> dict[Problem, Measured]:
    """Raises OSError or _NotOurs; a file that is not there is empty."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise _NotOurs(f"it is longer than {LARGEST_FILE >> 20} MiB")
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        if isinstance(error, _NotOurs):
            raise
        raise _NotOurs("it is not JSON") from None
    if not isinstance(document, dict):
        raise _NotOurs("it is not an object")
    for key, value in _header(facts).items():
        if document.get(key) != value:
            raise _NotOurs(f"its {key} is {document.get(key)!r}, here it is {value!r}")
    rows = document.get("choices")
    if not isinstance(rows, list):
        raise _NotOurs("its choices are not a list")
    return dict(_parse(row, number) for number, row in enumerate(rows))


def _parse(row: Any, number: int) -> tuple[Problem, Measured]:
    try:
        sizes, dtypes, tiles = row["sizes"], row["dtypes"], row["tiles"]
        times = row["seconds"], row["default_seconds"]
        good = (
            isinstance(row["kernel"], str)
            and isinstance(row["path"], str)
            and isinstance(sizes, list)
            and all(type(size) is int for size in sizes)
            and isinstance(dtypes, list)
            and all(isinstance(name, str) for name in dtypes)
            and isinstance(tiles, dict)
            and all(type(size) is int for size in tiles.values())
            and all(type(s) in (int, float) and math.isfinite(s) and s > 0 for s in times)
        )
    except (KeyError, TypeError):
        good = False
    if not good:
        raise _NotOurs(f"choice {number} is malformed")
    problem = Problem(row["kernel"], tuple(sizes), tuple(dtypes))
    return problem, Measured(Choice(row["path"], tiles), float(times[0]), float(times[1]))


def _write(path: Path, found: Mapping[Problem, Measured], facts: DeviceFacts) -> None:
    rows = [
        {
            "kernel": problem.kernel,
            "sizes": list(problem.sizes),
            "dtypes": list(problem.dtypes),
            "path": entry.choice.path,
            "tiles": dict(entry.choice.tiles),
            "seconds": entry.seconds,
            "default_seconds": entry.default_seconds,
        }
        for problem, entry in sorted(found.items())
    ]
    text = json.dumps({**_header(facts), "choices": rows}, indent=1, allow_nan=False)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text + "\n")
        Path(scratch).replace(path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let one process write at a time; the system drops the lock if the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
