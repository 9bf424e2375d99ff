"""What the kernels of a mixture of experts are compiled to: see ``compile_all``."""

from typing import Any

from kernels.triton import expert_linear, expert_order
from tests.kernels.triton.compilation import Compilation

INTEGERS = (
    "num_tiles",
    "n",
    "k",
    "x_stride",
    "x_scale_stride",
    "x_block_stride",
    "x_expert_stride",
)
HELD = {
    "dense": ("*bf16", "*bf16"),
    "int8": ("*i8", "*i8"),
    "e4m3": ("*fp8e4nv", "*fp8e4nv"),
    "codes": ("*bf16", "*u8"),
    "int4": ("*bf16", "*u8"),
    "int8_groups": ("*bf16", "*i8"),
}


def matmul(kind: str, block_m: int, block_k: int, columns: int = 0, **more: Any) -> Compilation:
    """One specialisation of the grouped product for tiles of `block_m` rows."""
    x, w = HELD[kind]
    swap = block_m <= 64
    scaled = kind in ("int8", "e4m3")
    return Compilation(
        expert_linear.expert_matmul_kernel,
        {
            "x": x,
            "x_scales": "*fp32",
            "w": w,
            "w_scales": "*fp32",
            "w_zeros": "*fp32",
            "out": "*bf16",
            "pairs": "*i32",
            "experts": "*i32",
            "rows": "*i32",
            **dict.fromkeys(INTEGERS, "i32"),
        },
        {
            "FORMAT": kind,
            "SCALED_ROWS": scaled,
            "TOP_K": 8,
            "SWAP": swap,
            "EVEN_K": True,
            "FACTOR": 256.0 if kind == "codes" else 1.0,
            "ROWS": 128 if kind == "e4m3" else 1,
            "COLUMNS": columns,
            "GROUP": 8,
            "BLOCK_M": block_m,
            "BLOCK_N": 64 if swap else 128,
            "BLOCK_K": block_k,
        },
        num_warps=4 if swap else 8,
        num_stages=more.get("num_stages", 4 if swap else 3),
        aligned=("n", "k", "x_stride"),
        least=89 if kind == "e4m3" else 80,
        label=f"{kind}{f' by {columns}' if columns else ''} {block_m} rows",
    )


def order(single: bool) -> Compilation:
    """Placing pairs of 128 experts."""
    return Compilation(
        expert_order._place_kernel,
        {
            "chosen": "*i64",
            "counts": "*i32",
            "pairs": "*i32",
            "experts": "*i32",
            "rows": "*i32",
            **dict.fromkeys(("num_pairs", "num_tiles", "chunks"), "i32"),
        },
        {
            "SINGLE": single,
            "EXPERTS": 128,
            "CHUNK": 256,
            "PIECE": 32,
            "STEP": 32,
            "BLOCK_M": 16,
            "TILES": 64,
        },
        num_warps=8,
        label="one chunk" if single else "chunks",
    )


COMPILATIONS = [
    order(True),
    order(False),
    matmul("dense", 16, 128),
    matmul("dense", 128, 64),
    matmul("int8", 16, 256),
    matmul("int8", 128, 128),
    matmul("e4m3", 16, 256),
    matmul("e4m3", 128, 128),
    matmul("e4m3", 16, 128, 128),
    matmul("e4m3", 128, 128, 128),
    matmul("codes", 16, 128),
    matmul("int4", 16, 128, 128),
    matmul("int4", 128, 64, 128),
    matmul("int8_groups", 16, 128, 128),
]
