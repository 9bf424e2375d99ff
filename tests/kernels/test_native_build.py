"""Building, caching and doing without the native library."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kernels import cpu
from kernels.cpu import native_build

ROOT = Path(__file__).parents[2]
STATUS = "from kernels import cpu; s = cpu.native_status(); print(s.available, s.amx, s.reason)"
RUNTIMES = """
from pathlib import Path
from kernels.cpu import native_status
assert native_status().available
maps = Path("/proc/self/maps").read_text()
names = {line.split()[-1] for line in maps.splitlines() if "/" in line}
print(*{name for name in names if Path(name).name.startswith(("libgomp", "libiomp5"))})
"""


def status_in_a_new_process(program: str = STATUS, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    return done.stdout.strip()


def needs_compiler() -> None:
    if not cpu.native_status().available:
        pytest.skip(f"no native kernels here: {cpu.native_status().reason}")


def test_the_switch_is_named_as_the_reason():
    assert status_in_a_new_process(AUTOTUNE_NATIVE="0") == (
        "False False switched off by AUTOTUNE_NATIVE=0"
    )


def test_processes_starting_together_build_one_library(tmp_path):
    needs_compiler()
    with ThreadPoolExecutor(2) as pool:
        lines = list(
            pool.map(lambda _: status_in_a_new_process(XDG_CACHE_HOME=str(tmp_path)), range(2))
        )
    assert all(line.startswith("True") for line in lines)
    left = sorted(path.suffix for path in (tmp_path / "autotune").iterdir())
    assert left == [".lock", ".so"]


def test_a_broken_compiler_is_one_sentence_and_plain_pytorch(tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'kernel.cpp:1: error: out of luck' >&2\nexit 1\n")
    compiler.chmod(0o755)
    line = status_in_a_new_process(CXX=str(compiler), XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert line == (
        "False False compiling the native kernels failed: kernel.cpp:1: error: out of luck"
    )


def test_a_missing_compiler_says_what_to_install(monkeypatch):
    monkeypatch.setattr(native_build.shutil, "which", lambda name: None)
    with pytest.raises(native_build.NativeBuildError, match=r"install g\+\+"):
        native_build.find_compiler()


def test_an_unusable_cache_folder_is_named(tmp_path):
    needs_compiler()
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    line = status_in_a_new_process(XDG_CACHE_HOME=str(blocked))
    assert line.startswith("False")
    assert "cache folder" in line


def test_one_openmp_runtime_in_the_process():
    needs_compiler()
    # In a process of its own: other tests import libraries that bring a runtime along.
    runtimes = status_in_a_new_process(RUNTIMES).split()
    assert len(runtimes) == 1
