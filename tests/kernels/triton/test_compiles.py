"""Every kernel compiles for GPUs that are not here, without spilling registers to memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU compiles what the other tests run")
def test_each_kernel_compiles(tmp_path: Path) -> None:
    # In a process of its own: in this one kernels are interpreted.
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    del environment["TRITON_INTERPRET"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.triton.compile_all", "90", "80", "--first"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, "\n".join(x for x in lines if x.startswith("FAILED")) + done.stderr
    for capability, least in (("sm_90:", 20), ("sm_80:", 5)):
        assert sum(line.startswith("ok ") and capability in line for line in lines) > least
