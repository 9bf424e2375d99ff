"""The platforms that a configuration can be exported to."""

from __future__ import annotations

from autotune.deploy.target import Target


def platform_targets() -> list[Target]:
    """Every platform, each with the engines that it can run."""
    return []
