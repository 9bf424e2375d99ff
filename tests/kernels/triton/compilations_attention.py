"""Specialisations of the attention kernels, for ``compile_all``."""

from dataclasses import replace
from typing import Any

from kernels.triton import decode_attention as decode
from kernels.triton import decode_tiles, prefill_tiles
from kernels.triton import prefill_attention as prefill
from kernels.triton.cached_values import BITS, CONVERSIONS, E4M3, INT8, PLAIN, columns_of
from kernels.triton.runtime import DeviceFacts
from kernels.triton.tuning import Problem
from tests.kernels.triton.compilation import Compilation

H200 = DeviceFacts("H200", (9, 0), 132, 232_448)
L40S = DeviceFacts("L40S", (8, 9), 142, 101_376)
NAMES = {PLAIN: "bf16", INT8: "int8", E4M3: "e4m3"}
DTYPES = {PLAIN: "torch.bfloat16", INT8: "torch.int8", E4M3: "torch.float8_e4m3fn"}
SIZES = (
    *("q_stride", "table_stride", "kv_heads", "splits", "window"),
    *("first_sequence", "sequences", "q_heads"),
)


def _types(kind: int) -> dict[str, str]:
    cache = "*bf16" if kind == PLAIN else "*i16"
    indices = dict.fromkeys(("tables", "context_lens", "query_start"), "*i32")
    reals = dict.fromkeys(("scale", "soft_cap"), "fp32")
    scales = dict.fromkeys(("key_scales", "value_scales"), "*fp32")
    floats = dict.fromkeys(("log_sums", "stretches"), "*fp32")
    sizes = dict.fromkeys(SIZES, "i32")
    tensors = {"q": "*bf16", "out": "*bf16", "keys": cache, "values": cache}
    tensors["trees"] = "*i64"
    return {**tensors, **indices, **reals, **scales, **floats, **sizes}


def _constants(
    head_dim: int, group: int, block_size: int, kind: int, assembly: int
) -> dict[str, Any]:
    return {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "COLUMNS": columns_of(head_dim, kind),
        "BLOCK_SIZE": block_size,
        "KIND": kind,
        "ASSEMBLY": assembly,
        "WINDOWED": False,
        "CAPPED": False,
        "TREES": False,
        "trees": None,
        **({"key_scales": None, "value_scales": None} if kind == PLAIN else {}),
    }


def decoding(
    head_dim: int,
    group: int,
    block_size: int,
    kind: int,
    split: bool,
    assembly: int = BITS,
    query_len: int = 1,
    facts: DeviceFacts = H200,
    **other: Any,
) -> Compilation:
    """The stretches' kernel with its default tiles, or others."""
    rows = decode_tiles.product_rows(query_len, group)
    dtypes = ("torch.bfloat16", DTYPES[kind])
    problem = Problem("decode_attention", (head_dim, rows, block_size, 512, 8192), dtypes)
    tiles = {**decode_tiles.default_choice(problem, facts).tiles, **other}
    constants = {
        **_constants(head_dim, group, block_size, kind, assembly),
        "QUERY_LEN": query_len,
        "SPLIT": split,
        "LEAST": decode_tiles.LEAST_STRETCH,
        "BLOCK_M": rows,
        "BLOCK_N": tiles["block_n"],
        "STAGES": tiles["num_stages"],
    }
    return Compilation(
        decode._decode_kernel,
        {**_types(kind), "out": "*fp32" if split else "*bf16"},
        constants,
        num_warps=tiles["num_warps"],
        num_stages=tiles["num_stages"],
        aligned=("q_stride",),
        least=89 if assembly == CONVERSIONS else 80,
        label=f"{NAMES[kind]} head {head_dim} rows {rows} page {block_size} {facts.name}",
    )


def prefilling(
    head_dim: int,
    group: int,
    block_size: int,
    kind: int,
    assembly: int = BITS,
    facts: DeviceFacts = H200,
    split: bool = False,
    **other: Any,
) -> Compilation:
    """The prefill kernel with its default tiles, or others."""
    dtypes = ("torch.bfloat16", DTYPES[kind])
    problem = Problem("prefill_attention", (head_dim, group, block_size, 1024), dtypes)
    tiles = {**prefill_tiles.default_choice(problem, facts).tiles, **other}
    constants = {
        **_constants(head_dim, group, block_size, kind, assembly),
        "OVERLAPPED": bool(tiles["overlapped"]),
        "SPLIT": split,
        "LEAST": prefill_tiles.LEAST_STRETCH,
        "BLOCK_M": tiles["block_m"],
        "BLOCK_N": tiles["block_n"],
        "STAGES": tiles["num_stages"],
    }
    return Compilation(
        prefill._prefill_kernel,
        {**_types(kind), "out": "*fp32" if split else "*bf16"},
        constants,
        num_warps=tiles["num_warps"],
        num_stages=tiles["num_stages"],
        aligned=("q_stride",),
        least=90 if facts is H200 else 80,
        label=f"{NAMES[kind]} head {head_dim} group {group} page {block_size} {facts.name}"
        f"{' split' if split else ''}",
    )


def specialised(what: Compilation, note: str, **constants: Any) -> Compilation:
    """With other compile-time constants."""
    label = f"{what.label} {note}"
    return replace(what, constants={**what.constants, **constants}, label=label)


def with_trees(what: Compilation) -> Compilation:
    """With the masks of drafted trees."""
    constants = {name: value for name, value in what.constants.items() if name != "trees"}
    return replace(what, constants={**constants, "TREES": True}, label=f"{what.label} trees")


def merging(splits: int) -> Compilation:
    """The merge of up to so many stretches."""
    constants = {
        "QUERY_LEN": 3,
        "HEAD_DIM": 128,
        "COLUMNS": 128,
        "WINDOWED": True,
        "LEAST": decode_tiles.LEAST_STRETCH,
        "BLOCK_N": 64,
        "SPLITS": splits,
    }
    return Compilation(decode._merge_kernel, _types(PLAIN), constants, label=f"of {splits}")


def merging_prefills(splits: int) -> Compilation:
    """The merge of up to so many stretches."""
    constants = {"HEAD_DIM": 128, "COLUMNS": 128, "SPLITS": splits}
    return Compilation(prefill._merge_kernel, _types(PLAIN), constants, label=f"prefills {splits}")


COMPILATIONS = [
    decoding(128, 8, 16, E4M3, False, CONVERSIONS),
    decoding(128, 4, 16, PLAIN, False),
    decoding(128, 4, 128, PLAIN, False),
    decoding(128, 4, 16, PLAIN, False, facts=L40S),
    decoding(128, 8, 16, INT8, False),
    decoding(128, 8, 16, E4M3, False),
    decoding(128, 8, 16, PLAIN, True, query_len=8),
    decoding(64, 7, 16, PLAIN, True),
    decoding(256, 4, 16, PLAIN, True),
    decoding(256, 4, 16, E4M3, True),
    decoding(80, 1, 32, PLAIN, True),
    specialised(decoding(64, 4, 16, PLAIN, True), "windowed", WINDOWED=True, CAPPED=True),
    # Triton makes a constant of a size of 1.
    specialised(decoding(128, 4, 16, INT8, True), "one head", kv_heads=1),
    with_trees(decoding(128, 4, 16, PLAIN, True, query_len=16)),
    with_trees(decoding(128, 8, 16, INT8, False, query_len=8)),
    with_trees(prefilling(128, 4, 16, PLAIN)),
    with_trees(prefilling(64, 7, 16, E4M3, split=True)),
    merging(2),
    merging(64),
    merging_prefills(prefill.LEAST_MERGED),
    merging_prefills(64),
    prefilling(128, 4, 128, PLAIN),
    specialised(prefilling(128, 4, 16, PLAIN), "one head", kv_heads=1),
    specialised(prefilling(256, 4, 16, PLAIN), "windowed", WINDOWED=True, CAPPED=True),
    *(
        prefilling(head_dim, group, 16, kind, facts=facts)
        for facts in (H200, L40S)
        for head_dim, group, kind in [
            (128, 4, PLAIN),
            (128, 8, INT8),
            (128, 8, E4M3),
            (64, 7, PLAIN),
            (256, 4, PLAIN),
            (256, 4, INT8),
            (80, 1, PLAIN),
        ]
    ),
    *(
        prefilling(head_dim, group, 16, kind, split=True)
        for head_dim, group, kind in [
            (128, 4, PLAIN),
            (128, 8, INT8),
            (64, 7, PLAIN),
            (256, 4, PLAIN),
            (80, 1, PLAIN),
        ]
    ),
    specialised(prefilling(256, 4, 16, PLAIN, split=True), "windowed", WINDOWED=True, CAPPED=True),
    specialised(prefilling(128, 8, 16, E4M3, split=True), "windowed", WINDOWED=True),
]
