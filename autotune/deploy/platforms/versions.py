"""The releases and images that platform files are pinned to: `versions.yaml` beside this file."""

from __future__ import annotations

from functools import cache
from importlib import resources

from pydantic import BaseModel, ConfigDict

from autotune.fast_yaml import safe_load


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Platform(_Strict):
    """One platform: its release, what its fields were checked against, its images by engine."""

    release: str
    checked: str
    images: dict[str, str] = {}


class Versions(_Strict):
    """The table: `platforms` by name."""

    platforms: dict[str, Platform]


@cache
def versions() -> Versions:
    """The installed table."""
    source = resources.files(__package__) / "versions.yaml"
    return Versions.model_validate(safe_load(source.read_text(encoding="utf-8")))


def platform(name: str) -> Platform:
    """What is known of one platform."""
    return versions().platforms[name]
