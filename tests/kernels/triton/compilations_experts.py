"""What the kernels of a mixture of experts are compiled to: see ``compile_all``."""

from kernels.triton import expert_linear, expert_order, expert_weight_only
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
HELD = {"dense": "*bf16", "int8": "*i8", "e4m3": "*fp8e4nv", "codes": "*i16"}


def matmul(kind: str, block_m: int, block_k: int, columns: int = 0) -> Compilation:
    """One specialisation of the grouped product for tiles of `block_m` rows."""
    swap = block_m <= 64
    return Compilation(
        expert_linear.expert_matmul_kernel,
        {
            "x": HELD[kind],
            "x_scales": "*fp32",
            "w": HELD[kind],
            "w_scales": "*fp32",
            "out": "*bf16",
            "pairs": "*i32",
            "experts": "*i32",
            "rows": "*i32",
            **dict.fromkeys(INTEGERS, "i32"),
        },
        {
            "SCALED": kind != "dense",
            "WIDEN": kind == "codes",
            "TOP_K": 8,
            "SWAP": swap,
            "EVEN_K": True,
            "ROWS": 128 if columns else 1,
            "COLUMNS": columns,
            "GROUP": 8,
            "BLOCK_M": block_m,
            "BLOCK_N": 64 if swap else 128,
            "BLOCK_K": block_k,
            "STAGES": 4 if swap else 3,
            "INTERPRETED": False,
        },
        num_warps=4 if swap else 8,
        aligned=("n", "k", "x_stride"),
        least=89 if kind == "e4m3" else 80,
        label=f"{kind}{f' by {columns}' if columns else ''} {block_m} rows",
    )


def weight_only(
    kind: int, label: str, block_m: int, *, words: bool = True, zeros: int = 0
) -> Compilation:
    """The grouped product of weights in groups of 128."""
    lanes = 4 if kind < 2 else 2
    return Compilation(
        expert_weight_only.expert_weight_only_kernel,
        {
            "x": "*bf16",
            "data": "*i16",
            "scales": "*i32" if words else "*fp32",
            "zeros": "*fp32",
            "table": "*fp32",
            "out": "*bf16",
            "pairs": "*i32",
            "experts": "*i32",
            "rows": "*i32",
            **dict.fromkeys(
                (
                    "num_tiles",
                    "n",
                    "k",
                    "units",
                    "x_stride",
                    "scale_stride",
                    "zero_stride",
                    "table_stride",
                ),
                "i32",
            ),
        },
        {
            "TOP_K": 8,
            "KIND": kind,
            "ZEROS": zeros,
            "WORDS": words,
            "HALF_SCALES": True,
            "GROUP": 128,
            "UNIT": 64 * lanes,
            "LANES": lanes,
            "EVEN_K": True,
            "BLOCK_M": block_m,
            "BLOCK_N": 64 if block_m <= 32 else 128,
            "BLOCK_K": 64 * lanes if block_m <= 32 else 32 * lanes,
            "STAGES": 4 if block_m <= 32 else 3,
            "INTERPRETED": False,
        },
        num_warps=4 if block_m <= 32 else 8,
        aligned=("n", "k", "x_stride"),
        label=f"{label} {block_m} rows",
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
    matmul("codes", 16, 64),
    weight_only(0, "int4", 16),
    weight_only(0, "int4 with zeros", 16, zeros=1),
    weight_only(0, "int4", 128),
    weight_only(1, "nf4", 16, words=False),
    weight_only(2, "int8", 16, words=False),
    weight_only(3, "e4m3", 16, words=False),
]
