"""Linear layers of every format against their bytes, their operations and cuBLAS in bf16."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.results import Row
from benchmarks.gpu.timing import Bench, Timing, relative_error
from engine.quantize import forms
from engine.quantize.methods import quantize_weight
from kernels import ops

SHAPES = ((4096, 14336), (28672, 4096), (6144, 4096))  # (N, K) of Llama 3.1 8B's larger layers
ROWS = (1, 4, 16, 64, 256, 512, 2048, 8192)
METHODS = ("int4", "nf4", "int8", "llm_int8", "fp8")
# What the format rounds activations to, beside bf16's own 2^-9.
ALLOWED = {"int4": 1e-2, "nf4": 1e-2, "int8": 2e-2, "llm_int8": 2e-2, "fp8": 5e-2}
RATES = {"int8": "int8", "llm_int8": "int8", "fp8": "float8_e4m3fn"}


def linears(bench: Bench, methods: Sequence[str] = METHODS) -> Iterator[Row]:
    """Every method at every number of rows; weights rotate so that none stays in the cache."""
    shapes = ((64, 128),) if bench.rehearsal else SHAPES
    rows = (1, 20) if bench.rehearsal else ROWS
    for n, k in shapes:
        dense = torch.randn(n, k, device=bench.device).mul_(k**-0.5).bfloat16()
        peers = {m: _peer(bench, dense, m) for m in rows}
        for method in methods:
            weight = forms.pack([quantize_weight(dense, method)], None, torch.bfloat16)
            copies = [weight, *_packed_again(bench, dense, method, weight.nbytes)]
            for m in rows:
                if bench.is_late:
                    return
                x = torch.randn(m, k, device=bench.device).bfloat16()
                yield Row(
                    f"linear {method}",
                    {"M": m, "N": n, "K": k},
                    bench.time([partial(ops.linear, x, w) for w in copies]),
                    num_bytes=weight.nbytes + 2 * m * (n + k),
                    operations=2 * m * n * k,
                    rate=RATES.get(method, "bfloat16"),
                    error=_error(x, weight),
                    allowed=ALLOWED[method],
                    peers={"cublas bf16": peers[m]},
                )


def block_scaled(bench: Bench) -> Iterator[Row]:
    """FP8 weights in blocks of 128 x 128, as DeepSeek-V3's checkpoints have them."""
    n, k = (128, 256) if bench.rehearsal else (4096, 14336)
    dense = torch.randn(n, k, device=bench.device).mul_(k**-0.5).bfloat16()
    blocks = dense.float().view(n // 128, 128, k // 128, 128)
    scales = blocks.abs().amax((1, 3)) / 448
    data = (blocks / scales[:, None, :, None]).view(n, k).to(torch.float8_e4m3fn)
    weight = ops.pack_fp8(data, scales, block_shape=(128, 128))
    for m in (20,) if bench.rehearsal else (1, 16, 512, 4096):
        if bench.is_late:
            return
        x = torch.randn(m, k, device=bench.device).bfloat16()
        yield Row(
            "linear fp8, blocks of 128",
            {"M": m, "N": n, "K": k},
            bench.time([partial(ops.linear, x, weight)]),
            num_bytes=weight.nbytes + 2 * m * (n + k),
            operations=2 * m * n * k,
            rate="float8_e4m3fn",
            error=_error(x, weight),
            allowed=5e-2,
            peers={"cublas bf16": _peer(bench, dense, m)},
        )


def _packed_again(
    bench: Bench, dense: Tensor, method: str, num_bytes: int
) -> Iterator[ops.LinearWeight]:
    for _ in range(bench.copies(num_bytes) - 1):
        yield forms.pack([quantize_weight(dense, method)], None, torch.bfloat16)


def _peer(bench: Bench, dense: Tensor, m: int) -> Timing:
    copies = [dense, *(dense.clone() for _ in range(bench.copies(dense.nbytes) - 1))]
    x = torch.randn(m, dense.shape[1], device=bench.device).bfloat16()
    return bench.time([partial(F.linear, x, w) for w in copies])


def _error(x: Tensor, weight: ops.LinearWeight, most: int = 64) -> float:
    """Against float64 of the very weight: what remains is the rounding of activations and sums."""
    x = x[:most]
    return relative_error(ops.linear(x, weight), x.double() @ ops.dequantize(weight).double().t())
