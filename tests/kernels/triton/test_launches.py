"""Launchers as a GPU would run them, up to the launch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs what is launched")
def test_odd_shapes_numbers_of_rows_and_shared_memory() -> None:
    """No argument breaks a kernel, no step compiles one again, and tiles fit small devices."""
    # In a process of its own: in this one kernels are interpreted.
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    del environment["TRITON_INTERPRET"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.triton.launches"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
