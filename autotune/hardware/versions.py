"""Versions of what the measurements depend on, read without importing any of it."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

DISTRIBUTIONS = {
    "autotune": "inference-autotune",
    "torch": "torch",
    "triton": "triton",
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "safetensors": "safetensors",
    "numpy": "numpy",
    "optuna": "optuna",
    "nvidia-ml-py": "nvidia-ml-py",
}


def library_versions() -> dict[str, str | None]:
    """Versions by name, `python` included; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name, distribution in DISTRIBUTIONS.items():
        try:
            found[name] = version(distribution)
        except PackageNotFoundError:
            found[name] = None
    return found
