"""The folder that a command's result goes into."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from autotune.errors import BadInput, EnvironmentMissing


@contextmanager
def claim_output(path: Path | None) -> Iterator[None]:
    """Make the folder that will take the result, before anything is measured.

    It goes away again if nothing was put into it, and so do those made above it.

    Raises:
        BadInput: it is in use.
        EnvironmentMissing: it cannot be made.
    """
    if path is None:
        yield
        return
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise BadInput(f"output folder {path} exists and is not empty: choose another with -o")
    made = [path, *(parent for parent in path.parents if not parent.exists())]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentMissing(f"output folder {path} cannot be made: {error}") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()  # only if it is empty
