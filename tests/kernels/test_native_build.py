"""Building, caching and doing without the native library."""

import ctypes
import fcntl
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kernels import cpu
from kernels.cpu import native, native_build

ROOT = Path(__file__).parents[2]
RUNTIMES = """
from pathlib import Path
from kernels.cpu import native_status
assert native_status().available
maps = Path("/proc/self/maps").read_text()
names = {line.split()[-1] for line in maps.splitlines() if "/" in line}
print(*{name for name in names if Path(name).name.startswith(("libgomp", "libiomp5"))})
"""
# The builder alone, without the seconds in which PyTorch is imported: its runtime is an argument.
BUILD = """
import ctypes, importlib.util, sys
from pathlib import Path
file, runtime, sources = sys.argv[1:]
ctypes.CDLL(runtime)
spec = importlib.util.spec_from_file_location("native_build", file)
builder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(builder)
builder.SOURCES = Path(sources)
print(builder.build())
"""


def needs_compiler() -> None:
    try:
        native_build.find_compiler()
    except native_build.NativeBuildError as error:
        pytest.skip(str(error))


@pytest.fixture
def afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is loaded yet, and the folder given back is where libraries are cached."""
    monkeypatch.setattr(native, "_state", native._State())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("AUTOTUNE_NATIVE", "1")
    return tmp_path / "autotune"


def executable(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}")
    path.chmod(0o755)
    return path


def test_the_library_is_built_wherever_there_is_a_compiler() -> None:
    """Else each test of it would be skipped, and nobody would know."""
    needs_compiler()
    if os.environ.get("AUTOTUNE_NATIVE") == "0" or platform.machine() != "x86_64":
        pytest.skip("the library is not wanted here")
    assert cpu.native_status().available, cpu.native_status().reason


def test_the_switch_is_named_as_the_reason(afresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOTUNE_NATIVE", "0")
    assert cpu.native_status() == cpu.NativeStatus(
        False, False, "switched off by AUTOTUNE_NATIVE=0"
    )
    assert native.library() is None
    assert not afresh.exists()


def test_processes_starting_together_build_one_library(tmp_path: Path) -> None:
    """Each is past its look for a library that is there before either may build one."""
    needs_compiler()
    sources, cache, log = tmp_path / "sources", tmp_path / "cache", tmp_path / "log"
    for number in (1, 2):
        sources.mkdir(exist_ok=True)
        text = f'extern "C" int number_{number}() {{ return {number}; }}\n'
        (sources / f"{number}.cpp").write_text(text)
    compiler = native_build.find_compiler()
    counting = executable(tmp_path / "c++", f'echo "$@" >> {log}\nexec {compiler} "$@"\n')
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "CXX": str(counting)}
    arguments = (native_build.__file__, native_build.openmp_runtime(), str(sources))
    folder = cache / "autotune"
    folder.mkdir(parents=True)

    def commands(flag: str) -> int:
        lines = log.read_text().splitlines() if log.exists() else []
        return sum(flag in line.split() for line in lines)

    with (folder / "build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        builders = [
            subprocess.Popen(
                [sys.executable, "-c", BUILD, *arguments], env=environment, stdout=subprocess.PIPE
            )
            for _ in range(2)
        ]
        deadline = time.monotonic() + 60.0
        while commands("--version") < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.2)  # from the compiler's version to the lock
        assert commands("-c") == 0
    told = [builder.communicate(timeout=60.0)[0].decode().strip() for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0]
    assert told[0] == told[1]
    library = ctypes.CDLL(told[0])
    assert (library.number_1(), library.number_2()) == (1, 2)
    assert (commands("-c"), commands("-shared")) == (2, 1)
    assert sorted(path.suffix for path in folder.iterdir()) == [".lock", ".so"]


def test_a_broken_compiler_is_one_sentence_and_plain_pytorch(
    afresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = executable(
        tmp_path / "broken", "echo 'kernel.cpp:1: error: out of luck' >&2\nexit 1\n"
    )
    monkeypatch.setenv("CXX", str(broken))
    assert cpu.native_status() == cpu.NativeStatus(
        False, False, "compiling the native kernels failed: kernel.cpp:1: error: out of luck"
    )
    assert native.library() is None


def test_a_missing_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_build.shutil, "which", lambda name: None)
    with pytest.raises(native_build.NativeBuildError, match=r"install g\+\+"):
        native_build.find_compiler()


def test_an_unusable_cache_folder_is_named(
    afresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_compiler()
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    status = cpu.native_status()
    assert not status.available
    assert f"the cache folder {blocked}/autotune is not usable" in status.reason


def test_one_openmp_runtime_in_the_process() -> None:
    if not cpu.native_status().available:
        pytest.skip(f"no native kernels here: {cpu.native_status().reason}")
    # In a process of its own: other tests import libraries that bring a runtime along.
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUNTIMES],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    assert len(done.stdout.split()) == 1
