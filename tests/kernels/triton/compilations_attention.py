"""Specialisations of the attention kernels, for ``compile_all``."""

from typing import Any

from kernels.triton import decode_attention as decode
from kernels.triton import prefill_attention as prefill
from kernels.triton.cached_values import BITS, CONVERSIONS, E4M3, INT8, PLAIN, columns_of
from kernels.triton.runtime import DeviceFacts
from kernels.triton.tuning import Problem
from tests.kernels.triton.compilation import Compilation

H200 = DeviceFacts("H200", (9, 0), 132, 232_448)
L40S = DeviceFacts("L40S", (8, 9), 142, 101_376)
CACHES = {PLAIN: "*bf16", INT8: "*i16", E4M3: "*i16"}
NAMES = {PLAIN: "bf16", INT8: "int8", E4M3: "e4m3"}
DTYPES = {PLAIN: "torch.bfloat16", INT8: "torch.int8", E4M3: "torch.float8_e4m3fn"}


SIZES = (
    *("q_stride", "table_stride", "kv_heads", "splits", "window"),
    *("first_sequence", "sequences"),
)


def _types(kind: int) -> dict[str, str]:
    pointers = {"q": "*bf16", "keys": CACHES[kind], "values": CACHES[kind]}
    indices = dict.fromkeys(("tables", "context_lens", "query_start"), "*i32")
    sizes = dict.fromkeys(SIZES, "i32")
    reals = dict.fromkeys(("scale", "soft_cap"), "fp32")
    scales = dict.fromkeys(("key_scales", "value_scales"), "*fp32") if kind != PLAIN else {}
    return {**pointers, **indices, **sizes, **reals, **scales, "log_sums": "*fp32"}


def decoding(
    head_dim: int,
    group: int,
    block_size: int,
    kind: int,
    split: bool,
    assembly: int = BITS,
    **other: Any,
) -> Compilation:
    """The stretches' kernel with its default tiles."""
    problem = Problem(
        "decode_attention",
        (head_dim, decode.product_rows(1, group), block_size, 512, 8192),
        ("torch.bfloat16", DTYPES[kind]),
    )
    tiles = {**decode.default_choice(problem, H200).tiles, **other}
    constants = {
        "GROUP": group,
        "QUERY_LEN": 1,
        "HEAD_DIM": head_dim,
        "COLUMNS": columns_of(head_dim, kind),
        "BLOCK_SIZE": block_size,
        "KIND": kind,
        "ASSEMBLY": assembly,
        "WINDOWED": False,
        "CAPPED": False,
        "SPLIT": split,
        "LEAST": decode.LEAST_STRETCH,
        "BLOCK_M": problem.sizes[1],
        "BLOCK_N": tiles["block_n"],
        "STAGES": tiles["num_stages"],
        **({"key_scales": None, "value_scales": None} if kind == PLAIN else {}),
    }
    return Compilation(
        decode._decode_kernel,
        {**_types(kind), "out": "*fp32" if split else "*bf16"},
        constants,
        num_warps=tiles["num_warps"],
        num_stages=tiles["num_stages"],
        aligned=("q_stride",),
        label=f"{NAMES[kind]} head {head_dim} group {group} page {block_size} ",
    )


def prefilling(
    head_dim: int,
    group: int,
    block_size: int,
    kind: int,
    assembly: int = BITS,
    windowed: bool = False,
    facts: DeviceFacts = H200,
    **other: Any,
) -> Compilation:
    """The prefill kernel with its default tiles."""
    problem = Problem(
        "prefill_attention",
        (head_dim, group, block_size, 1024),
        ("torch.bfloat16", DTYPES[kind]),
    )
    tiles = {**prefill.default_choice(problem, facts).tiles, **other}
    constants = {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "COLUMNS": columns_of(head_dim, kind),
        "BLOCK_SIZE": block_size,
        "KIND": kind,
        "ASSEMBLY": assembly,
        "WINDOWED": windowed,
        "CAPPED": False,
        "OVERLAPPED": kind == PLAIN and bool(tiles["overlapped"]),
        "BLOCK_M": tiles["block_m"],
        "BLOCK_N": tiles["block_n"],
        "STAGES": tiles["num_stages"],
        **({"key_scales": None, "value_scales": None} if kind == PLAIN else {}),
    }
    return Compilation(
        prefill._prefill_kernel,
        {**_types(kind), "out": "*bf16"},
        constants,
        num_warps=tiles["num_warps"],
        num_stages=tiles["num_stages"],
        aligned=("q_stride",),
        least=90 if facts is H200 else 80,
        label=f"{NAMES[kind]} head {head_dim} group {group} page {block_size} {facts.name}",
    )


COMPILATIONS = [
    decoding(128, 8, 16, E4M3, False, CONVERSIONS),
    *(
        decoding(head_dim, group, block_size, kind, split)
        for head_dim, group, block_size, kind, split in [
            (128, 4, 16, PLAIN, False),
            (128, 4, 128, PLAIN, False),
            (128, 8, 16, INT8, False),
            (128, 8, 16, E4M3, False),
            (64, 7, 16, PLAIN, True),
            (256, 4, 16, PLAIN, True),
            (256, 4, 16, E4M3, True),
            (80, 1, 32, PLAIN, True),
        ]
    ),
    prefilling(128, 4, 128, PLAIN),
    *(
        prefilling(head_dim, group, 16, kind, windowed=windowed, facts=facts)
        for facts in (H200, L40S)
        for head_dim, group, kind, windowed in [
            (128, 4, PLAIN, False),
            (128, 8, INT8, False),
            (128, 8, E4M3, False),
            (64, 7, PLAIN, False),
            (256, 4, PLAIN, True),
            (256, 4, INT8, False),
            (80, 1, PLAIN, False),
        ]
    ),
]
