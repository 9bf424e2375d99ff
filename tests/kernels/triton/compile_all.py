"""Compiles every listed kernel: `python -m tests.kernels.triton.compile_all 80 90 [part of name]`.

With `--first` only the first specialisation of each kernel that the capability has; and from the
second capability on only kernels that multiply matrices, since others compile to much the same.
Prints a line for each: registers a thread, spilled bytes, shared memory and, but for the first
ones, the instructions that tell a fast kernel from a slow one. Exits with 1 where one cannot be
compiled, spills much or needs more shared memory than a block can have.
"""

import importlib
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from tests.kernels.triton.compilation import SHARED_MEMORY, Compilation, compiled

MOST_SPILLED = 256
OF_A_TRAP = 8  # registers: what is left of a kernel that the compiler could not fit
SHOWN = ("HGMMA", "QGMMA", "IGMMA", "HMMA", "IMMA", "LDGSTS", "LDG", "LDSM", "UTMALDG", "LDL")


def everything() -> list[Compilation]:
    """The compilations of all files `compilations_*.py` beside this one."""
    found: list[Compilation] = []
    for path in sorted(Path(__file__).parent.glob("compilations_*.py")):
        module = importlib.import_module(f"tests.kernels.triton.{path.stem}")
        found += module.COMPILATIONS
    return found


def main(arguments: list[str]) -> int:
    """Compile for the given capabilities; returns the exit code."""
    capabilities = [int(a) for a in arguments if a.isdigit()]
    wanted = [a for a in arguments if not a.isdigit() and a != "--first"]
    first = "--first" in arguments
    done: set[tuple[int, int]] = set()
    alike: set[int] = set()
    failures = 0
    for what in everything():
        same = id(what.kernel)  # of two files' kernels the names may be one
        name = f"{what.kernel.__name__} {what.label}".strip()
        if wanted and not any(part in name for part in wanted):
            continue
        for capability in capabilities:
            seen = (same, capability) in done or same in alike
            if capability < what.least or (first and seen):
                continue
            done.add((same, capability))
            try:
                with redirect_stdout(StringIO()):  # of Triton, which shows all code in an error
                    needs = compiled(what, capability, counted=not first)
            except Exception as error:
                failures += 1
                told = " ".join(str(error).split())[:300]
                print(f"FAILED {name} sm_{capability}: {type(error).__name__}: {told}")
                continue
            if not needs.products:
                alike.add(same)
            shown = " ".join(
                f"{key}:{count}" for key, count in needs.instructions.items() if key in SHOWN
            )
            bad = (
                needs.stack > MOST_SPILLED
                or needs.shared_memory > SHARED_MEMORY[capability]
                or needs.registers <= OF_A_TRAP
            )
            failures += bad
            print(
                f"{'FAILED' if bad else 'ok'} {name} sm_{capability}: {needs.registers} registers, "
                f"{needs.stack} B spilled, {needs.shared_memory} B shared, {shown}"
            )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
