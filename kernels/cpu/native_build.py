"""Compiles ``native/*.cpp`` at first use and keeps the result in the user's cache folder.

The library is keyed by sources, compiler, flags and CPU features, so that a cache shared by
different machines never serves instructions that this CPU lacks, and it appears by an atomic
rename, so that no process can see half a file.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # not a POSIX system; the atomic rename alone must do
    fcntl = None

SOURCES = Path(__file__).parent / "native"
FLAGS = ["-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-w"]
COMPILE_TIMEOUT_S = 300


class NativeBuildError(RuntimeError):
    """The native library could not be built; the message is one sentence that says why."""


def cache_folder() -> Path:
    """Where compiled libraries live: ``$XDG_CACHE_HOME/autotune`` or ``~/.cache/autotune``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "autotune"


def cpu_features() -> str:
    """The CPU's name and feature flags as the kernel reports them; empty where it does not."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()
    lines = (line.partition(":") for line in text.splitlines())
    wanted = {"model name", "flags", "Features", "CPU implementer", "CPU part"}
    found = {key.strip(): value.strip() for key, _, value in lines if key.strip() in wanted}
    return repr(sorted(found.items()))


def find_compiler() -> str:
    """Path of a C++ compiler: ``$CXX``, g++, c++ or clang++. Raises NativeBuildError if none."""
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        path = shutil.which(name) if name else None
        if path:
            return path
    raise NativeBuildError("no C++ compiler found (install g++ to get the native CPU kernels)")


def openmp_runtime() -> str:
    """Path of the OpenMP runtime that PyTorch has loaded into this process.

    Linking against that very file keeps one pool of threads; a second runtime would fight for the
    same cores. Raises NativeBuildError if PyTorch uses none.
    """
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise NativeBuildError(f"cannot find PyTorch's OpenMP runtime: {error}") from error
    loaded = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "/" in line}
    names = ("libgomp", "libiomp5", "libomp")
    found = sorted(path for path in loaded if Path(path).name.startswith(names))
    ours = [path for path in found if "torch" in path]
    if not found:
        raise NativeBuildError("PyTorch has no OpenMP runtime loaded in this process")
    return (ours or found)[0]


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeBuildError(f"running {Path(command[0]).name} failed: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr]
        raise NativeBuildError(f"compiling the native kernels failed: {lines[0].strip()}")
    return done.stdout


def build() -> Path:
    """Path of the compiled library, from the cache or built now (a few seconds).

    Raises NativeBuildError when there is no compiler, or it fails, or the cache is not writable.
    """
    compiler = find_compiler()
    runtime = openmp_runtime()
    digest = hashlib.sha256()
    version = _run([compiler, "--version"])
    for part in (compiler, version, " ".join(FLAGS), runtime, cpu_features()):
        digest.update(part.encode() + b"\0")
    for source in sorted(SOURCES.iterdir()):
        if source.suffix in (".cpp", ".h"):
            digest.update(source.name.encode() + b"\0" + source.read_bytes())
    folder = cache_folder()
    library = folder / f"kernels-{digest.hexdigest()[:24]}.so"
    if library.exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _only_builder(folder), tempfile.TemporaryDirectory(dir=folder) as scratch:
            if not library.exists():  # another process may have built it while we waited
                _compile(compiler, runtime, Path(scratch) / "kernels.so")
                (Path(scratch) / "kernels.so").replace(library)
    except OSError as error:
        raise NativeBuildError(f"the cache folder {folder} is not usable: {error}") from error
    return library


@contextmanager
def _only_builder(folder: Path) -> Iterator[None]:
    """Let one process build at a time; the kernel drops the lock if the process dies."""
    with (folder / "build.lock").open("w") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(compiler: str, runtime: str, target: Path) -> None:
    def compile_one(source: Path) -> str:
        object_file = target.parent / f"{source.stem}.o"
        _run([compiler, *FLAGS, "-c", str(source), "-o", str(object_file)])
        return str(object_file)

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        objects = list(pool.map(compile_one, sorted(SOURCES.glob("*.cpp"))))
    # Without -fopenmp here, or the linker would add the compiler's own runtime.
    _run([compiler, "-shared", *objects, runtime, "-lm", "-o", str(target)])
