"""Compiling kernels for GPUs that are not there, and what the compiled code needs of them.

Not in a process with TRITON_INTERPRET=1, where kernels are interpreted functions.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Most shared memory of one block in bytes, by compute capability (CUDA programming guide).
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448}


@dataclass(frozen=True, slots=True)
class Compilation:
    """One specialisation of a kernel.

    `types` are the types of its run-time arguments in order of their names ("*bf16", "i32",
    "fp32"), `constants` its compile-time ones. `aligned` arguments are multiples of 16 (pointers
    always are). `least` is the compute capability from which it is used.
    """

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    aligned: Sequence[str] = ()
    least: int = 80
    label: str = ""


@dataclass(frozen=True, slots=True)
class Resources:
    """What one block needs: registers a thread, bytes of spilled registers, of shared memory.

    `products`: whether matrices are multiplied. `instructions`: how many there are of each.
    """

    registers: int
    stack: int
    shared_memory: int
    products: bool
    instructions: Mapping[str, int] = field(default_factory=dict)


def compiled(what: Compilation, capability: int, *, counted: bool = True) -> Resources:
    """Compile for a compute capability (90 for 9.0) and read the machine code's needs.

    Unless `counted` the instructions are left out.
    """
    names = what.kernel.arg_names
    signature = {n: "constexpr" if n in what.constants else what.types[n] for n in names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if signature[n].startswith("*") or n in what.aligned
    }
    source = ASTSource(what.kernel, signature, dict(what.constants), attributes)
    options = {"num_warps": what.num_warps, "num_stages": what.num_stages}
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()

        def dump(what: str) -> str:
            command = [CUOBJDUMP, f"--dump-{what}", file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = dump("resource-usage")
        code = dump("sass") if counted else ""
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    instructions: dict[str, int] = {}
    for name in re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", code, re.MULTILINE):
        instructions[name] = instructions.get(name, 0) + 1
    products = "mma" in done.asm["ptx"]  # mma.sync or wgmma
    return Resources(int(found[1]), int(found[2]), done.metadata.shared, products, instructions)
