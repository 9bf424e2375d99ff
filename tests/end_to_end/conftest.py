"""Running `autotune` as a user does: a process of its own, its streams, its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ENVIRONMENT = {**os.environ, "NO_COLOR": "1", "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
ENTRY = (sys.executable, "-m", "autotune.cli.main")

Autotune = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def autotune(tmp_path: Path) -> Autotune:
    """Run a command line in an empty folder and wait for it."""

    def call(*arguments: str, timeout: float = 240.0) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*ENTRY, *arguments],
            cwd=tmp_path,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return call
