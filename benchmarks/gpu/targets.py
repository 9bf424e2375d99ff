"""The figures that were asked for, taken from what was measured."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.ceilings import Ceilings
from benchmarks.gpu.results import Row, Target


def held_against(
    rows: list[Row], engine: list[dict[str, Any]], peer: dict[str, Any] | None, most: Ceilings
) -> list[Target]:
    """Every target; `engine` and `peer` are as they are written to the results."""

    def row(name: str, **shape: int) -> Row | None:
        found = (r for r in rows if r.name == name and shape.items() <= r.shape.items())
        return next(found, None)

    def gain(name: str, **shape: int) -> float | None:
        """Times faster than the best peer."""
        found = row(name, **shape)
        best = None if found is None else found.best_peer()
        return None if found is None or best is None else best / found.timing.median

    def step(name: str, **shape: int) -> float | None:
        found = (e for e in engine if e["name"] == name and shape.items() <= e["shape"].items())
        return next((e["times_the_floor"] for e in found), None)

    decode = {"batch": 64, "context": 8192}
    wide = row("decode attention, bfloat16 cache", **decode)
    share = None if wide is None else wide.floor(most) / wide.timing.median
    targets = [Target("decode attention 64 x 8k, share of copy bandwidth", 0.85, share)]
    for name in ("int8", "fp8"):
        narrow = row(f"decode attention, {name} cache", **decode)
        ratio = wide.timing.median / narrow.timing.median if wide and narrow else None
        targets.append(Target(f"the same with an {name} cache, times bf16", 1.6, ratio))
    for length in (4096, 16384):
        found = gain("prefill attention", context=length)
        targets.append(Target(f"prefill attention {length}, of PyTorch's best", 0.75, found))
    for m in (1, 4, 16):
        found = gain("linear int4", M=m, N=4096, K=14336)
        targets.append(Target(f"W4A16 {m} x 4096 x 14336, times cuBLAS", 2.5, found))
    for m in (512, 2048):
        found = gain("linear fp8", M=m, N=4096, K=14336)
        targets.append(Target(f"FP8 {m} x 4096 x 14336, times cuBLAS", 1.4, found))
    one, many = (step("decode step, none", batch=b) for b in (1, 64))
    prefill = step("prefill step")
    return [
        *targets,
        Target("8B decode step, batch 1, times its floor", 1.35, one, at_most=True),
        Target("8B decode step, batch 64 x 1k, times its floor", 1.5, many, at_most=True),
        Target(
            "8B prefill of 8k, share of the matmul rate", 0.55, 1 / prefill if prefill else None
        ),
        Target("throughput, times generate_batch", 3.0, peer["ratio"] if peer else None),
    ]
