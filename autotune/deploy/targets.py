"""Every target of `autotune export`: the bundled engine, other engines, platforms."""

from __future__ import annotations

from autotune.deploy.engine_targets import engine_targets
from autotune.deploy.platform_targets import platform_targets
from autotune.deploy.target import Target
from autotune.errors import BadInput


def all_targets() -> dict[str, Target]:
    """The targets by name: the bundled engine first, then the other engines, then platforms."""
    return {target.name: target for target in (*engine_targets(), *platform_targets())}


def find_target(name: str) -> Target:
    """The target of that name.

    Raises:
        BadInput: there is none.
    """
    targets = all_targets()
    if name not in targets:
        raise BadInput(f"cannot export to {name!r}; known are {', '.join(targets)}")
    return targets[name]
