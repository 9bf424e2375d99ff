"""What sampling launches: vocabularies of 32,000, 128,256 and 262,144."""

from kernels.triton import sampling
from tests.kernels.triton.compilation import Compilation

PART = sampling.LEAST_PART
POINTERS = {
    "parameters": "*fp64",
    "maxima": "*fp32",
    "masses": "*fp64",
    "listed": "*i32",
    "tokens": "*i64",
    "stride": "i32",
    "columns": "i32",
    "parts": "i32",
    "rows": "i32",
}


def _parts(kind: str) -> Compilation:
    types = {"logits": f"*{kind}"} | POINTERS
    constants = {"TILE": sampling.PARTS_AT_ONCE, "PART": PART}
    return Compilation(
        sampling._parts_kernel, types, constants, aligned=("stride", "columns"), label=kind
    )


def _draw(kind: str, zeros: int, parts: int) -> Compilation:
    constants = {"ZEROS": zeros, "PARTS": parts, "TILE": sampling.PARTS_AT_ONCE, "PART": PART}
    return Compilation(
        sampling._draw_kernel,
        {"logits": f"*{kind}"} | POINTERS,
        constants,
        num_warps=sampling.DRAW_WARPS,
        aligned=("stride", "columns"),
        label=f"{kind} {parts} parts",
    )


COMPILATIONS = [
    *(_parts(kind) for kind in ("bf16", "fp16", "fp32")),
    _draw("bf16", 16, 256),
    _draw("bf16", 16, 1024),
    _draw("bf16", 16, 2048),
    _draw("fp16", 13, 1024),
    _draw("fp32", 0, 1024),
    _draw("fp32", 0, 2048),
    Compilation(
        sampling._change_kernel,
        {"logits": "*fp32", "places": "*i64", "factors": "*fp32", "amounts": "*fp32"}
        | {"count": "i32"},
        {"BLOCK": 256},
    ),
]
