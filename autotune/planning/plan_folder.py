"""The folder that a plan is written to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from autotune.errors import BadInput, EnvironmentMissing
from autotune.planning.plan import Plan
from autotune.records import SCHEMA_VERSION, RunFolder, utc_now


@contextmanager
def claim_folder(path: Path | None) -> Iterator[None]:
    """Make the folder before anything is planned; it goes away again if nothing was put into it.

    Raises:
        BadInput: it is in use.
        EnvironmentMissing: it cannot be made.
    """
    if path is None:
        yield
        return
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise BadInput(f"output folder {path} exists and is not empty: choose another with -o")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentMissing(f"output folder {path} cannot be made: {error}") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.rmdir()  # only if it is empty


def save_plan(plan: Plan, path: Path, command: Sequence[str], seconds: float) -> None:
    """Write plan.json into the folder."""
    from importlib.metadata import version

    folder = RunFolder(path)
    folder.write_json(
        folder.plan_json,
        {
            "schema_version": SCHEMA_VERSION,
            "command": list(command),
            "created_at": utc_now(),
            "seconds": seconds,
            "versions": {"autotune": version("inference-autotune")},
            **plan.to_json(),
        },
    )
