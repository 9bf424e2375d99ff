"""What models launch of norms, activations, rotary embeddings, cache writes, rounding, routing."""

from typing import Any

from kernels.triton import activation, cache_write, move_kv, norm, quantize_rows, rotary, route
from tests.kernels.triton.compilation import Compilation


def _norm(kind: str, weight: str, width: int, residual: bool) -> Compilation:
    block = 1 << (width - 1).bit_length()
    none = {} if residual else {"residual": None}
    return Compilation(
        norm._rms_norm_kernel,
        {
            "x": f"*{kind}",
            "residual": f"*{kind}",
            "weight": f"*{weight}",
            "out": f"*{kind}",
            "x_stride": "i32",
            "residual_stride": "i32",
            "eps": "fp32",
        },
        {"WIDTH": width, "BLOCK": block, "ROUND_FIRST": kind == weight} | none,
        num_warps=norm.row_warps(block),
        aligned=("x_stride", "residual_stride"),
        label=f"{kind} {weight} {width}{' residual' if residual else ''}",
    )


def _head_norm(kind: str, weight: str, head_dim: int, block_rows: int) -> Compilation:
    return Compilation(
        norm._head_rms_norm_kernel,
        {"x": f"*{kind}", "weight": f"*{weight}", "x_stride": "i32", "eps": "fp32"}
        | {"num_rows": "i32"},
        {
            "HEADS": 32,
            "HEAD_DIM": head_dim,
            "BLOCK_D": 1 << (head_dim - 1).bit_length(),
            "BLOCK_ROWS": block_rows,
            "ROUND_FIRST": kind == weight,
        },
        aligned=("x_stride",),
        label=f"{kind} {weight} {head_dim} rows {block_rows}",
    )


def _gated(kind: str, activated: int, block: int) -> Compilation:
    return Compilation(
        activation._gated_kernel,
        {"x": f"*{kind}", "out": f"*{kind}", "x_stride": "i32", "width": "i32"},
        {"KIND": activated, "BLOCK": block},
        num_warps=max(2, block // 512),
        aligned=("x_stride", "width"),
        label=f"{kind} kind {activated} {block}",
    )


def _heads(head_dim: int, turning: int) -> dict[str, int]:
    return {
        "QUERY_HEADS": 32,
        "KEY_HEADS": 8,
        "HEAD_DIM": head_dim,
        "TURNING": turning,
        "BLOCK_HALF": 1 << (turning // 2 - 1).bit_length(),
        "BLOCK_HEADS": rotary.HEADS_PER_PROGRAM,
    }


def _rotary(kind: str, head_dim: int, turning: int) -> Compilation:
    return Compilation(
        rotary._rotary_kernel,
        {"q": f"*{kind}", "k": f"*{kind}", "positions": "*i64", "table": "*fp32"}
        | {"q_stride": "i32", "k_stride": "i32"},
        _heads(head_dim, turning),
        num_warps=2,
        aligned=("q_stride", "k_stride"),
        label=f"{kind} {head_dim} turning {turning}",
    )


def _write(
    kind: str, code: int, head_dim: int, turning: int, least: int = 80, norm: str = ""
) -> Compilation:
    cached = kind if code < 0 else "u8"
    types = dict.fromkeys("qkv", f"*{kind}")
    types |= {"positions": "*i64", "table": "*fp32", "slots": "*i64"}
    types |= {"keys": f"*{cached}", "values": f"*{cached}"}
    types |= {"key_scales": "*fp32", "value_scales": "*fp32"}
    types |= {"q_stride": "i32", "k_stride": "i32", "v_stride": "i32", "eps": "fp32"}
    types |= {"query_norm": f"*{norm}", "key_norm": f"*{norm}"}
    constants: dict[str, Any] = {"PAGE": 16, "CODE": code} | _heads(head_dim, turning)
    constants["ROUND_FIRST"] = norm == kind
    if not norm:
        constants |= {"query_norm": None, "key_norm": None}
    constants["BLOCK_D"] = 1 << (head_dim - 1).bit_length()
    if code < 0:
        constants |= {"key_scales": None, "value_scales": None}
    kernel: Any = cache_write._write_kernel
    if turning:
        kernel = cache_write._rotary_and_write_kernel
        constants["BLOCK_REST"] = 1 << (max(1, head_dim - turning) - 1).bit_length()
    return Compilation(
        kernel,
        types,
        {name: value for name, value in constants.items() if name in kernel.arg_names},
        num_warps=2,
        aligned=("q_stride", "k_stride", "v_stride"),
        least=least,
        label=f"{kind} code {code} {head_dim} turning {turning} {norm}".strip(),
    )


def _move(kind: str, head_dim: int, scatters: bool) -> Compilation:
    types = dict.fromkeys(("keys", "values", "buffer"), f"*{kind}")
    types |= dict.fromkeys(("key_scales", "value_scales", "scale_buffer"), "*fp32")
    types |= {"sources": "*i64", "targets": "*i64"}
    constants: dict[str, Any] = {"HEADS": 8, "HEAD_DIM": head_dim, "PAGE": 16}
    constants |= {"SCALED": kind == "u8", "SCATTERS": scatters}
    constants |= {
        "BLOCK_D": 1 << (head_dim - 1).bit_length(),
        "BLOCK_HEADS": rotary.HEADS_PER_PROGRAM,
    }
    if kind != "u8":
        constants |= {"key_scales": None, "value_scales": None, "scale_buffer": None}
    label = f"{kind} {head_dim} {'scattered' if scatters else 'gathered'}"
    return Compilation(move_kv._copy_kernel, types, constants, num_warps=2, label=label)


def _quantize(kind: str, code: int, width: int, block: int, count: int, least: int) -> Compilation:
    padded = 1 << (block - 1).bit_length()
    return Compilation(
        quantize_rows._block_kernel,
        {"x": f"*{kind}", "data": "*u8", "row_scales": "*fp32"}
        | {"x_stride": "i32", "width": "i32", "num_blocks": "i32"},
        {
            "BLOCKS_PER_ROW": -(-width // block),
            "BLOCK": block,
            "PADDED": padded,
            "COUNT": count,
            "LEAST": 1e-30 if code else 0.0,
            "CODE": code,
        },
        num_warps=4 if padded <= 1024 else norm.row_warps(padded),
        aligned=("x_stride", "width"),
        least=least,
        label=f"{kind} code {code} {width} by {block} count {count}",
    )


def _wide(kind: str, code: int, least: int) -> Compilation:
    return Compilation(
        quantize_rows._wide_row_kernel,
        {"x": f"*{kind}", "data": "*u8", "row_scales": "*fp32", "x_stride": "i32", "width": "i32"},
        {"SIZE": quantize_rows.CHUNK, "LEAST": 1e-30 if code else 0.0, "CODE": code},
        num_warps=16,
        aligned=("x_stride", "width"),
        least=least,
        label=f"{kind} code {code}",
    )


def _route(kind: str, experts: int, top_k: int) -> Compilation:
    return Compilation(
        route._route_kernel,
        {"logits": f"*{kind}", "weights": "*fp32", "experts": "*i64", "stride": "i32"},
        {
            "EXPERTS": experts,
            "BLOCK_E": 1 << (experts - 1).bit_length(),
            "TOP_K": top_k,
            "BLOCK_K": 1 << (top_k - 1).bit_length(),
            "NORMALIZE": True,
        },
        num_warps=1,
        aligned=("stride",),
        label=f"{kind} {experts} top {top_k}",
    )


COMPILATIONS = [
    _norm("bf16", "bf16", 4096, residual=True),
    _norm("bf16", "bf16", 4096, residual=False),
    _norm("bf16", "fp32", 4608, residual=True),
    _norm("fp32", "fp32", 576, residual=True),
    _norm("fp16", "fp16", 16384, residual=True),
    _head_norm("bf16", "bf16", 128, 8),
    _head_norm("bf16", "bf16", 128, 32),
    _head_norm("fp16", "fp32", 80, 8),
    _gated("bf16", 0, 2048),
    _gated("bf16", 0, 512),
    _gated("bf16", 1, 2048),
    _gated("bf16", 2, 2048),
    _gated("fp32", 0, 2048),
    _rotary("bf16", 128, 128),
    _rotary("fp16", 80, 20),
    _write("bf16", -1, 128, 128),
    _write("bf16", -1, 128, 0),
    _write("bf16", 0, 128, 128),
    _write("bf16", 0, 96, 0),
    _write("bf16", 1, 128, 128, least=89),
    _write("bf16", 2, 128, 128),
    _write("bf16", 0, 128, 64),
    _write("fp32", -1, 80, 20),
    _write("bf16", -1, 128, 128, norm="bf16"),
    _write("bf16", 1, 128, 128, least=89, norm="bf16"),
    _write("bf16", 0, 128, 64, norm="fp32"),
    _move("bf16", 128, False),
    _move("bf16", 80, True),
    _move("u8", 128, False),
    _move("u8", 128, True),
    _quantize("bf16", 0, 4096, 4096, 1, 80),
    _quantize("bf16", 0, 14336, 14336, 1, 80),
    _quantize("bf16", 1, 4096, 4096, 1, 89),
    _quantize("bf16", 2, 4096, 4096, 1, 80),
    _quantize("bf16", 1, 4096, 128, 8, 89),
    _quantize("bf16", 1, 4096, 128, 32, 89),
    _quantize("fp32", 0, 4096, 4096, 1, 80),
    _wide("bf16", 0, 80),
    _wide("bf16", 1, 89),
    _route("bf16", 128, 8),
    _route("fp32", 8, 2),
]
