"""What the quantized products are compiled to: see ``compile_all``."""

from typing import Any

from kernels.triton import fp8_linear, int8_linear, scaled_matmul
from tests.kernels.triton.compilation import Compilation

SCALED = {
    "x": "*i8",
    "row_scales": "*fp32",
    "w": "*i8",
    "column_scales": "*fp32",
    "bias": "*bf16",
    "raw": "*bf16",
    "words": "*i32",
    "out": "*bf16",
    "m": "i32",
    "n": "i32",
    "k": "i32",
    "row_scale_stride": "i32",
    "length": "i32",
    "threshold": "fp32",
}
FEW = {"SWAP": True, "SPLITS": 1, "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 256}
MANY = {"SWAP": False, "SPLITS": 1, "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128}


def scaled(kind: str, label: str, tile: dict[str, Any], **more: Any) -> Compilation:
    """One specialisation of the product of rows and weights in `kind`."""
    held = {"int8": "*i8", "e4m3": "*fp8e4nv", "codes": "*i16"}[kind]
    options = {"num_warps": more.pop("num_warps", 4), "num_stages": more.pop("num_stages", 4)}
    out = more.pop("out", "*bf16")
    constants = {
        "INTEGERS": kind == "int8",
        "WIDEN": kind == "codes",
        "EVEN_K": True,
        "BIAS": False,
        "CHUNK": 0,
        "GROUP": 8,
        "INTERPRETED": False,
        **tile,
        **more,
    }
    return Compilation(
        scaled_matmul.scaled_matmul_kernel,
        {**SCALED, "x": held, "w": held, "out": out},
        constants,
        aligned=("n", "k", "length"),
        least=89 if kind == "e4m3" else 80,
        label=f"{kind} {label}",
        **options,
    )


def blocks(kind: str, label: str, tile: dict[str, Any], rows: int, **more: Any) -> Compilation:
    """One specialisation of the product of e4m3 in blocks of `rows` x 128."""
    held = {"e4m3": "*fp8e4nv", "codes": "*i16"}[kind]
    options = {"num_warps": more.pop("num_warps", 4), "num_stages": more.pop("num_stages", 4)}
    return Compilation(
        fp8_linear.block_scaled_kernel,
        {
            "x": held,
            "x_scales": "*fp32",
            "w": held,
            "w_scales": "*fp32",
            "bias": "*bf16",
            "out": "*bf16",
            **dict.fromkeys(
                ("m", "n", "k", "x_scale_stride", "x_block_stride", "w_scale_stride", "length"),
                "i32",
            ),
        },
        {
            "WIDEN": kind == "codes",
            "EVEN_K": True,
            "BIAS": False,
            "ROWS": rows,
            "COLUMNS": 64 if kind == "codes" else 128,
            "GROUP": 8,
            **tile,
            "BLOCK_K": 64 if kind == "codes" else 128,
            "STAGES": options["num_stages"],
            "INTERPRETED": False,
        },
        aligned=("n", "k", "length"),
        least=89 if kind == "e4m3" else 80,
        label=f"{kind} {label}",
        **options,
    )


SPLIT = Compilation(
    int8_linear._split_kernel,
    {
        "x": "*bf16",
        "data": "*u8",
        "row_scales": "*fp32",
        "words": "*i32",
        "stride": "i32",
        "width": "i32",
        "threshold": "fp32",
    },
    {"COUNT": 8, "CHUNK": 512},
    num_warps=8,
    aligned=("stride", "width"),
    label="4096 columns",
)
MERGE = Compilation(
    scaled_matmul.merge_kernel,
    {
        "parts": "*i32",
        "row_scales": "*fp32",
        "column_scales": "*fp32",
        "bias": "*bf16",
        "out": "*bf16",
        **dict.fromkeys(("n", "row_stride", "part_stride", "row_scale_stride"), "i32"),
    },
    {
        "SPLITS": 4,
        "SCALE_ROWS": True,
        "SCALE_COLUMNS": True,
        "BIAS": False,
        "BLOCK_N": 1024,
    },
    aligned=("n", "row_stride", "part_stride"),
)

COMPILATIONS = [
    SPLIT,
    MERGE,
    blocks("e4m3", "16 rows", FEW, 128),
    blocks("e4m3", "64 rows", {**FEW, "BLOCK_M": 64}, 128),
    blocks("e4m3", "128 rows", MANY, 128, num_warps=8, num_stages=3),
    blocks("e4m3", "128 rows of narrow blocks", MANY, 64, num_warps=8, num_stages=3),
    blocks("codes", "16 rows", FEW, 128),
    scaled("int8", "16 rows", FEW),
    scaled("int8", "64 rows", {**FEW, "BLOCK_M": 64, "BLOCK_K": 128}),
    scaled("int8", "16 rows split", {**FEW, "SPLITS": 4}, out="*i32"),
    scaled("int8", "128 rows", MANY, num_warps=8, num_stages=3),
    scaled("int8", "16 rows outliers", FEW, CHUNK=512),
    scaled("int8", "128 rows outliers", MANY, CHUNK=512, num_warps=8, num_stages=3),
    scaled("e4m3", "16 rows", FEW),
    scaled("e4m3", "128 rows", MANY, num_warps=8, num_stages=3),
    scaled("codes", "16 rows", {**FEW, "BLOCK_K": 64}),
    scaled("codes", "128 rows", {**MANY, "BLOCK_K": 64}, num_warps=8, num_stages=3),
]
