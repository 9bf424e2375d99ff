"""Names that platforms accept."""

from __future__ import annotations

import re
from pathlib import PurePath

_LONGEST = 50  # leaves room for suffixes below Kubernetes' 63 characters


def slug(name: str) -> str:
    """A name for Kubernetes, Compose and systemd: lower-case letters, digits and dashes.

    It begins with a letter, as a Service's name must (RFC 1035).
    """
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:_LONGEST].strip("-")
    return words if words[:1].isalpha() else f"model-{words}".strip("-")


def is_path(model: str) -> bool:
    """Whether a model is named by a path of the file system, not by one of the hub."""
    return model.startswith(("/", ".", "~")) or model.count("/") != 1


def last_part(model: str) -> str:
    """The last part of a path, a URI or a hub's name."""
    return PurePath(model.rstrip("/")).name
