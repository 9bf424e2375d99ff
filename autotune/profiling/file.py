"""`profile.json` on disk: written whole or not at all, checked when read."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from autotune.errors import BadInput
from autotune.profiling.schema import PROFILE_VERSION, Profile
from autotune.records import write_atomically

PROFILE_NAME = "profile.json"


def write_profile(path: Path, profile: Profile) -> None:
    """Write a profile to a file."""
    write_atomically(path, (profile.model_dump_json(indent=2) + "\n").encode())


def read_profile(path: Path) -> Profile:
    """Read a profile, from its file or the folder that holds one.

    Raises:
        BadInput: there is none, it is of another version, or it is no profile.
    """
    file = path / PROFILE_NAME if path.is_dir() else path
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{file} does not exist: make it with autotune profile -o") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{file} cannot be read: {error}") from error
    version = raw.get("profile_version") if isinstance(raw, dict) else None
    if version != PROFILE_VERSION:
        raise BadInput(
            f"{file} has profile version {version!r}; this release reads {PROFILE_VERSION}: make "
            "it again with autotune profile"
        )
    try:
        return Profile.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BadInput(f"{file}: {where or 'it'} is not valid: {first['msg']}") from None
