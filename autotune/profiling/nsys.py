"""NVIDIA Nsight Systems around a command of ours: what to type, and how to run it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from autotune.errors import BadInput, EnvironmentMissing

_FLAG = "--nsys"


def nsys_command(arguments: Sequence[str], report: Path, executable: str = "nsys") -> list[str]:
    """The command that runs `autotune` with these arguments, without `--nsys`, under nsys.

    Kernels within CUDA graphs are told one by one, and the processes of other ranks are followed.

    Args:
        arguments: of `autotune`.
        report: file to write, without its ending.
        executable: the program.
    """
    return [
        executable,
        "profile",
        "--trace=cuda,nvtx,osrt,cublas,cudnn",
        "--cuda-graph-trace=node",
        "--trace-fork-before-exec=true",
        "--sample=none",
        "--force-overwrite=false",
        f"--output={report}",
        sys.executable,
        "-m",
        "autotune.cli.main",
        *(argument for argument in arguments if argument != _FLAG),
    ]


def as_typed(command: Sequence[str]) -> str:
    """A command as a shell takes it."""
    return shlex.join(command)


def run_under_nsys(
    command: Sequence[str], report: Path, say: Callable[[str], None] = lambda _: None
) -> int:
    """Say and run a command of `nsys_command` in this terminal; its exit code.

    Ctrl-C reaches the command itself, which stops cleanly; this waits for it.

    Raises:
        BadInput: the report is there already.
        EnvironmentMissing: nsys is not installed, or cannot be run.
    """
    file = report.with_name(report.name + ".nsys-rep")
    if file.exists():
        raise BadInput(f"{file} exists: choose another folder with -o")
    program = shutil.which(command[0])
    if program is None:
        raise EnvironmentMissing(
            "--nsys needs NVIDIA Nsight Systems, and no nsys is on the PATH: install it from "
            "https://developer.nvidia.com/nsight-systems, then run: " + as_typed(command)
        )
    try:
        say(f"Running: {as_typed(command)}")
        report.parent.mkdir(parents=True, exist_ok=True)
        with subprocess.Popen([program, *command[1:]], env=os.environ) as process:
            while True:
                try:
                    return process.wait()
                except KeyboardInterrupt:
                    continue  # the terminal has told the command as well
    except OSError as error:
        raise EnvironmentMissing(f"nsys cannot be run: {error}") from error
