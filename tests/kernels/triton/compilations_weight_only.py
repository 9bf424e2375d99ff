"""What the products with widened weights are compiled to: see ``compile_all``."""

from typing import Any

from kernels.triton import weight_only_kernels
from kernels.triton.weight_only_unpack import FLOATS, FP8, INT4, INT8, INTEGERS, SYMMETRIC, TABLE4
from tests.kernels.triton.compilation import Compilation

TYPES = {
    "x": "*bf16",
    "data": "*i16",
    "scales": "*i32",
    "zeros": "*fp32",
    "table": "*fp32",
    "bias": "*bf16",
    "out": "*fp32",
    "partial": "*fp32",
    **dict.fromkeys(("M", "N", "K", "units", "stride_x", "tiles_m", "units_per_split"), "i32"),
    "size": "i32",
}
FEW = {"BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_K": 256, "STAGES": 3}
NARROW = {**FEW, "BLOCK_N": 64}
BYTES = {**FEW, "BLOCK_K": 128}
SOME = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 128, "STAGES": 4}
MANY = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "STAGES": 3}
MANY_BY_WARPS = {**MANY, "BLOCK_K": 64, "STAGES": 4}


def form(kind: Any, zeros: Any, group: int, words: bool) -> dict[str, Any]:
    """How a weight lies: units of 256 columns, 128 of bytes."""
    lanes = 2 if kind in (INT8, FP8) else 4
    return {
        "KIND": kind.value,
        "ZEROS": zeros.value,
        "WORDS": words,
        "HALF_SCALES": True,
        "GROUP": group,
        "UNIT": 64 * lanes,
        "LANES": lanes,
    }


SYMMETRIC_INT4 = form(INT4, SYMMETRIC, 128, True)
FORMS = {
    "int4": SYMMETRIC_INT4,
    "int4 group 64": form(INT4, SYMMETRIC, 64, True),
    "int4 zeros": form(INT4, INTEGERS, 128, True),
    "int4 float zeros": form(INT4, FLOATS, 128, False),
    "table": form(TABLE4, SYMMETRIC, 64, True),
    "int8": form(INT8, SYMMETRIC, 128, False),
    "fp8": form(FP8, SYMMETRIC, 0, False),
}


def product(
    label: str, how: dict[str, Any], tile: dict[str, int], warps: int = 4, **more: Any
) -> Compilation:
    """One specialisation of the product."""
    types = {**TYPES, "scales": "*i32" if how["WORDS"] else "*fp32", **more.pop("types", {})}
    constants = {**how, "EVEN_K": True, "HAS_BIAS": False, "INTERPRETED": False, **tile}
    return Compilation(
        weight_only_kernels.weight_only_kernel,
        types,
        constants,
        num_warps=warps,
        num_stages=3,
        aligned=("N", "K", "stride_x"),
        label=label,
        **more,
    )


COMPILATIONS = [
    *(
        product(f"{name}, few rows", how, BYTES if how["LANES"] == 2 else FEW)
        for name, how in FORMS.items()
        if name != "table"
    ),
    product("table, few rows, narrow", FORMS["table"], NARROW),
    product("int4, few rows, narrow", SYMMETRIC_INT4, NARROW),
    product("int4, few rows, float16", SYMMETRIC_INT4, FEW, types={"x": "*fp16"}),
    product("int4, 64 rows", SYMMETRIC_INT4, SOME, 8, types={"out": "*bf16"}),
    product("int4, many rows", SYMMETRIC_INT4, MANY, 8, types={"out": "*bf16"}, least=90),
    product("int4, many rows, by warps", SYMMETRIC_INT4, MANY_BY_WARPS, 8, types={"out": "*bf16"}),
    product("fp8, many rows", FORMS["fp8"], MANY_BY_WARPS, 8, types={"out": "*bf16"}),
    Compilation(
        weight_only_kernels.merge_kernel,
        {**TYPES, "out": "*bf16"},
        {"SPLITS": 4, "HAS_BIAS": True, "BLOCK": 1024},
        aligned=("size", "N"),
        label="weight only",
    ),
    Compilation(
        weight_only_kernels.widen_kernel,
        {**TYPES, "out": "*bf16"},
        {**SYMMETRIC_INT4, "BLOCK_N": 32},
        aligned=("N", "K"),
        label="weight only",
    ),
]
