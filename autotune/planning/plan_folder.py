"""The folder that a plan is written to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from autotune.planning.plan import Plan
from autotune.records import SCHEMA_VERSION, RunFolder, utc_now


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
