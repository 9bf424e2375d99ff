"""The measured GPU's name as a platform spells it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from autotune.deploy.target import Deployment


def accelerator(deployment: Deployment, known: Mapping[str, str]) -> str | None:
    """A platform's name of the GPU that was measured, such as `H100` of "NVIDIA H100 80GB HBM3".

    Arguments:
        deployment: what was measured, and where.
        known: the platform's names by the model's own.

    Returns:
        None on a CPU, or where the platform has no such GPU.
    """
    if deployment.evidence.device != "cuda":
        return None
    words = re.split(r"[^A-Z0-9]+", str((deployment.run.get("hardware") or {}).get("name")).upper())
    return next((name for model, name in known.items() if model.upper() in words), None)
