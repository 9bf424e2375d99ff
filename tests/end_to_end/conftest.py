"""Running `autotune` as a user does: a process of its own, its streams, its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from autotune.cli.main import app

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


@pytest.fixture
def in_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Autotune:
    """The same within this process, which spares starting one."""
    monkeypatch.chdir(tmp_path)
    for name in ("NO_COLOR", "COLUMNS"):
        monkeypatch.setenv(name, ENVIRONMENT[name])

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["autotune", *arguments])
        done = CliRunner().invoke(app, arguments, prog_name="autotune")
        return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)

    return call
