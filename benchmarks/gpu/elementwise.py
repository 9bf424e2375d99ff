"""Norms, rotary embedding with the cache write, activations and sampling against their bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.gpu.attention import HEAD_DIM, HEADS, KV_HEADS
from benchmarks.gpu.results import Row
from benchmarks.gpu.timing import Bench, Timing
from kernels import ops
from kernels.layer_cache import LayerCache
from kernels.triton.runtime import without_triton

HIDDEN, INNER, BLOCK = 4096, 14336, 16
ROWS = (1, 64, 8192)


def _row(
    bench: Bench, name: str, tokens: int, calls: list[Callable[[], object]], num_bytes: float
) -> Row:
    """The kernel, and plain PyTorch as its peer."""
    timing = bench.time(calls)
    peers: dict[str, Timing | str] = {}
    if bench.device.type == "cuda":
        with without_triton():
            peers["plain PyTorch"] = bench.time(calls[:2])
    return Row(name, {"tokens": tokens}, timing, num_bytes=num_bytes, peers=peers)


def elementwise(bench: Bench) -> Iterator[Row]:
    """What stands between the matmuls of a Llama 3.1 8B layer."""
    device = bench.device
    for tokens in (2,) if bench.rehearsal else ROWS:
        if bench.is_late:
            return
        hidden = 128 if bench.rehearsal else HIDDEN
        inner = 128 if bench.rehearsal else INNER
        size = 2 * tokens * hidden
        copies = bench.copies(4 * size)
        weight = torch.rand(hidden, device=device).bfloat16()
        xs = [torch.randn(tokens, hidden, device=device).bfloat16() for _ in range(copies)]
        residuals = [torch.zeros_like(x) for x in xs]
        yield _row(
            bench,
            "add + RMSNorm",
            tokens,
            [
                partial(ops.add_rms_norm, x, r, weight, 1e-5)
                for x, r in zip(xs, residuals, strict=True)
            ],
            4 * size,
        )
        ups = [
            torch.randn(tokens, 2 * inner, device=device).bfloat16()
            for _ in range(bench.copies(6 * tokens * inner))
        ]
        calls: list[Callable[[], object]] = [partial(ops.silu_and_mul, x) for x in ups]
        yield _row(bench, "SiLU and multiply", tokens, calls, 6 * tokens * inner)
        yield from _cache_writes(bench, tokens)


def _cache_writes(bench: Bench, tokens: int) -> Iterator[Row]:
    device = bench.device
    pages = max(8, 2 * tokens // BLOCK)
    positions = torch.arange(tokens, device=device)
    slots = torch.randperm(pages * BLOCK, device=device)[:tokens]
    table = torch.rand(max(tokens, 16), HEAD_DIM, device=device)
    fused = torch.randn(tokens, HEADS + 2 * KV_HEADS, HEAD_DIM, device=device).bfloat16()
    q, k = fused.narrow(1, 0, HEADS), fused.narrow(1, HEADS, KV_HEADS)
    v = fused.narrow(1, HEADS + KV_HEADS, KV_HEADS)
    for name, dtype in (("bf16", torch.bfloat16), ("int8", torch.int8)):
        cache = LayerCache.allocate((pages, KV_HEADS, BLOCK, HEAD_DIM), dtype, device)
        read = 2 * fused.numel() + 4 * tokens * HEAD_DIM
        written = 2 * q.numel() + 2 * k.numel() * dtype.itemsize
        yield _row(
            bench,
            f"rotary + write to {name} cache",
            tokens,
            [partial(ops.rotary_and_write_kv, q, k, v, positions, table, cache, slots)],
            read + written,
        )
