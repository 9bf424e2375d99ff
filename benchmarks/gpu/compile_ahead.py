"""Compiling the kernels that will be measured, all parts side by side, before any is measured.

A kernel takes one core seconds to compile at its first launch, and some 150 are launched: one after
the other that would be most of the time there is. Triton keeps what it compiled on disk, where the
measuring process finds it. What fails here is left to that process, which tells of it.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from benchmarks.gpu.results import Row
from benchmarks.gpu.timing import Bench

COMMAND = (sys.executable, "-m", "benchmarks.gpu.check", "--compile")
CACHE_BYTES = 4 << 30  # of each engine, as all of them are there at once


def work() -> dict[str, Callable[[Bench], object]]:
    """What one process compiles each: by running it all once, untimed."""
    from benchmarks.gpu import attention, elementwise, engine, linears

    def drained(rows: Callable[[Bench], Iterator[Row]]) -> Callable[[Bench], object]:
        return lambda bench: list(rows(bench))

    found: dict[str, Callable[[Bench], object]] = {
        f"engine {method}": partial(
            engine.Loaded, quantization=method, kv_cache_memory_bytes=CACHE_BYTES
        )
        for method in engine.METHODS
    }
    found |= {
        f"linears {method}": drained(partial(linears.linears, methods=(method,)))
        for method in linears.METHODS
    }
    kernels = (
        attention.decodes,
        attention.prefills,
        linears.block_scaled,
        elementwise.elementwise,
    )
    return found | {rows.__name__: drained(rows) for rows in kernels}


def compile_side_by_side(
    names: Sequence[str], seconds: float, command: Sequence[str] = COMMAND
) -> None:
    """A process for each name; those that are not done after so many seconds are ended."""
    end = time.monotonic() + seconds
    processes = [
        subprocess.Popen([*command, name], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for name in names
    ]
    try:
        for process in processes:
            process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
