"""Measures kernels and engine on the GPU at hand and writes JSON: see `scripts/gpu_check.sh`.

    python -m benchmarks.gpu.check --out benchmarks/results --seconds 300
    python -m benchmarks.gpu.check --rehearse

The second runs every part on tiny shapes, on a CPU in Triton's interpreter, and saves nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from benchmarks.gpu.ceilings import Ceilings
    from benchmarks.gpu.timing import Bench

# What compiling may take of the whole time.
COMPILING = 0.25
# What each part may take of the rest; what it does not use is the next one's.
SHARES = {"attention": 0.25, "linears": 0.25, "elementwise": 0.05, "engine": 0.3, "peer": 0.15}


def main(arguments: list[str] | None = None) -> int:
    """Run the check; returns the exit code: 1 if a kernel was wrong, 3 without a usable GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seconds", type=float, default=300.0, help="time for everything")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, nothing is saved")
    parser.add_argument("--compile", metavar="PART", help="compile its kernels, measure nothing")
    options = parser.parse_args(arguments)
    from kernels.triton import runtime

    if options.rehearse and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
        from tests.kernels.triton.interpreter import repaired

        with repaired(), runtime.interpreting(), tempfile.TemporaryDirectory() as folder:
            return check(torch.device("cpu"), Path(folder), options.seconds, True)
    device = torch.device("cuda", 0)
    status = runtime.status(device)
    if not status.available:
        print(
            f"No measurements: {status.reason}. A GPU of compute capability 8.0 or newer is "
            "needed, with Triton beside a CUDA build of PyTorch.",
            file=sys.stderr,
        )
        return 3
    if options.compile:
        from benchmarks.gpu import compile_ahead
        from benchmarks.gpu.timing import Bench

        deadline = time.monotonic() + options.seconds
        compile_ahead.work()[options.compile](Bench(device, False, deadline, compiling=True))
        return 0
    place = tempfile.TemporaryDirectory() if options.rehearse else nullcontext(options.out)
    with place as folder:
        return check(device, Path(folder), options.seconds, options.rehearse)


def check(device: torch.device, out: Path, seconds: float, rehearsal: bool) -> int:
    """All parts in turn; each one's file is written as soon as it is done."""
    from benchmarks.gpu import attention, ceilings, compile_ahead, elementwise, linears
    from benchmarks.gpu.results import Row
    from benchmarks.gpu.targets import held_against
    from benchmarks.gpu.timing import Bench

    torch.manual_seed(int(time.time()))  # fresh inputs in every run
    folder = out / machine(device)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    if not rehearsal:
        compile_ahead.compile_side_by_side(list(compile_ahead.work()), COMPILING * seconds)
        print(f"{time.monotonic() - began:.0f} s for compiling", flush=True)
    start = time.monotonic()
    left = seconds - (start - began)
    most = ceilings.measure(Bench(device, rehearsal, start + left))
    about = environment(device, rehearsal) | {"ceilings": most.to_json()}
    print(
        f"{about['device']}: copies {most.copy_bandwidth / 1e12:.2f} TB/s, matmul "
        + ", ".join(f"{k} {v / 1e12:.0f}" for k, v in most.matmul.items())
        + " T operations/s"
    )
    failures: dict[str, str] = {}
    wrong = 0
    rows: list[Row] = []
    spent = 0.0

    def until(part: str) -> Bench:
        nonlocal spent
        spent += SHARES[part]
        return Bench(device, rehearsal, start + left * spent)

    kernel_parts: dict[str, list[Callable[[Bench], Iterator[Row]]]] = {
        "attention": [attention.decodes, attention.prefills],
        "linears": [linears.linears, linears.block_scaled],
        "elementwise": [elementwise.elementwise],
    }
    for part, functions in kernel_parts.items():
        bench = until(part)
        found: list[Row] = []
        for function in functions:
            try:
                for row in function(bench):
                    print(row.line(most), flush=True)
                    found.append(row)
            except Exception as error:
                failures[function.__name__] = _sentence(error)
        rows += found
        wrong += sum(not row.is_right for row in found)
        _write(folder / f"{part}.json", about | {"rows": [row.to_json(most) for row in found]})
    measured: list[dict[str, Any]] = []
    peer: dict[str, Any] | None = None
    for name in ("engine", "peer"):
        bench = until(name)
        if name == "engine":
            _engine_steps(bench, most, measured, failures)
        else:
            peer = _against_transformers(bench, failures)
        # After each, so that a peer which takes too long takes nothing with it.
        engine_file = about | {"rows": measured, "against_transformers": peer}
        _write(folder / "engine.json", engine_file)
        targets = held_against(rows, measured, peer, most)
        listed = {"targets": [t.to_json() for t in targets], "failures": failures}
        _write(folder / "targets.json", about | listed)
    if rehearsal:
        print("A rehearsal: everything ran, and its times mean nothing.")
    else:
        print("\n".join(target.line() for target in targets))
    for name, sentence in failures.items():
        print(f"{name} did not run: {sentence}", file=sys.stderr)
    print(f"{time.monotonic() - began:.0f} s; results are in {folder}")
    return 1 if wrong or failures else 0


def _engine_steps(
    bench: Bench, most: Ceilings, measured: list[dict[str, Any]], failures: dict[str, str]
) -> None:
    from benchmarks.gpu import engine

    def take(row: engine.EngineRow) -> None:
        print(row.line(), flush=True)
        measured.append(row.to_json())

    def decodes(method: str) -> None:
        for row in engine.decode_rows(bench, most, method):
            take(row)

    work: dict[str, Callable[[], None]] = {"prefill": lambda: take(engine.prefill_row(bench, most))}
    work |= {f"decode, {method}": partial(decodes, method) for method in engine.METHODS}
    for name, run in work.items():
        _attempt(name, run, bench, failures)


def _against_transformers(bench: Bench, failures: dict[str, str]) -> dict[str, Any] | None:
    from benchmarks.gpu import against_transformers

    found: list[dict[str, Any]] = []

    def compare() -> None:
        found.append(against_transformers.compare(bench))

    _attempt("transformers", compare, bench, failures)
    return found[0] if found else None


def _attempt(name: str, run: Callable[[], None], bench: Bench, failures: dict[str, str]) -> None:
    """What fails is told and does not keep the rest from being measured."""
    if bench.is_late:
        print(f"{name}: no time is left for it", flush=True)
        return
    try:
        run()
    except Exception as error:
        failures[name] = _sentence(error)
    if bench.device.type == "cuda":
        gc.collect()  # the next model needs the memory of this one
        torch.cuda.empty_cache()


def machine(device: torch.device) -> str:
    """The folder of a device's results: "NVIDIA H200" is h200."""
    if device.type == "cpu":
        return "rehearsal"
    name = torch.cuda.get_device_name(device).lower().removeprefix("nvidia ")
    return re.sub("[^a-z0-9]+", "-", name).strip("-")


def environment(device: torch.device, rehearsal: bool) -> dict[str, Any]:
    """What the figures depend on."""
    import triton  # not before it is known whether kernels are interpreted

    about: dict[str, Any] = {
        "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "rehearsal": rehearsal,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "triton": triton.__version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "cuda": torch.version.cuda,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
        }
    return about


def _write(path: Path, what: dict[str, Any]) -> None:
    """Replace the file in one step."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(what, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


if __name__ == "__main__":
    sys.exit(main())
