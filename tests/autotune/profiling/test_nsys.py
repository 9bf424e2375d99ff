"""The Nsight Systems command: what is typed, run through a stand-in, and its absence."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest

from autotune.errors import BadInput, EnvironmentMissing
from autotune.profiling.nsys import as_typed, nsys_command, run_under_nsys


def fake_nsys(folder: Path, body: str) -> Path:
    program = folder / "nsys"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    return program


def test_command_runs_the_same_without_the_flag(tmp_path: Path) -> None:
    command = nsys_command(
        ["profile", "--nsys", "--rate", "4", "--slo", "ttft<1s"], tmp_path / "report"
    )
    assert command[:2] == ["nsys", "profile"]
    program = command.index(sys.executable)
    assert command[program:] == [
        *(sys.executable, "-m", "autotune.cli.main"),
        *("profile", "--rate", "4", "--slo", "ttft<1s"),
    ]
    assert f"--output={tmp_path / 'report'}" in command[:program]
    assert "'ttft<1s'" in as_typed(command), "a shell must not read < as a redirection"


def test_exit_code_is_that_of_the_command(tmp_path: Path) -> None:
    program = fake_nsys(tmp_path, f'echo "$@" > {tmp_path}/got; exit 7')
    command = nsys_command(["profile"], tmp_path / "report", str(program))
    assert run_under_nsys(command, tmp_path / "report") == 7
    assert "autotune.cli.main profile" in (tmp_path / "got").read_text()


def test_missing_nsys_is_told_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    command = nsys_command(["profile", "--rate", "4"], tmp_path / "report")
    with pytest.raises(EnvironmentMissing, match=r"no nsys is on the PATH.*--rate 4"):
        run_under_nsys(command, tmp_path / "report")


def test_report_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    program = fake_nsys(tmp_path, "exit 0")
    (tmp_path / "report.nsys-rep").write_text("mine")
    with pytest.raises(BadInput, match=r"report\.nsys-rep exists"):
        run_under_nsys(["nsys", str(program)], tmp_path / "report")
