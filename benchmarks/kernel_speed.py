"""The kernels against plain PyTorch, in one run: linears, attention, and whole decoder steps.

    python benchmarks/kernel_speed.py [--out benchmarks/results/<machine>/kernels.json] [--quick]

Candidates take turns, so that a disturbance hits all of them; each figure is the median, with the
fastest and the slowest beside it. Weights rotate through more copies than caches hold.
"""

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from kernels import cpu, limits, ops

Candidates = dict[str, Callable[[], object]]
DTYPE = torch.bfloat16
GROUP = 64
# The random-weight Llama of 135M parameters that the project's speed targets are stated for.
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCABULARY = 576, 30, 9, 3, 64, 1536, 49152
BLOCK = 16


def take_turns(candidates: Candidates, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each candidate in each of the rounds, after one that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    for _ in range(repeats):
        for name, run in candidates.items():
            begin = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - begin) * 1e3)
    return times


def race(candidates: Candidates, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each candidate: median, fastest, slowest over alternating repeats."""
    return {
        name: {"median_ms": statistics.median(t), "min_ms": min(t), "max_ms": max(t)}
        for name, t in take_turns(candidates, repeats).items()
    }


def plainly(run: Callable[[], object]) -> Callable[[], object]:
    """The same work without the native kernels."""

    def wrapped() -> object:
        with cpu.without_native():
            return run()

    return wrapped


def pack(kind: str, n: int, k: int) -> ops.LinearWeight:
    """A random weight of one format."""
    if kind == "int8":
        q = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        return ops.pack_int8(q, torch.full((n,), 1e-3))
    if kind == "int4":
        groups = (n, k // GROUP)
        q = torch.randint(0, 16, (n, k), dtype=torch.uint8)
        return ops.pack_int4(q, torch.full(groups, 1e-2), torch.full(groups, 8.0), GROUP)
    return ops.pack_dense((torch.randn(n, k) * 0.05).to(DTYPE))


def linears(quick: bool) -> list[dict[str, object]]:
    """One linear layer by format and rows, against F.linear in bf16."""
    results = []
    for n, k in ((4096, 4096), (2 * INTERMEDIATE, HIDDEN)):
        copies = max(2, (96 << 20) // (n * k * 2))
        dense = [torch.randn(n, k).to(DTYPE) for _ in range(copies)]
        packed = {kind: [pack(kind, n, k) for _ in range(copies)] for kind in KINDS}
        for rows in (1, 8, 32, 256) if quick else (1, 4, 8, 16, 32, 64, 256, 1024, 2048):
            x = torch.randn(rows, k).to(DTYPE)
            candidates: Candidates = {
                "F.linear bf16": lambda x=x, dense=dense: [F.linear(x, w) for w in dense]  # type: ignore[misc]
            }
            for kind, weights in packed.items():
                candidates[kind] = lambda x=x, weights=weights: [  # type: ignore[misc]
                    ops.linear(x, w) for w in weights
                ]
            times = race(candidates, 5 if rows > 64 else 9)
            for figures in times.values():
                for key in figures:
                    figures[key] /= copies
            results.append({"n": n, "k": k, "rows": rows, "times": times})
            show(f"linear {n}x{k} rows {rows}", times)
    return results


def attention(quick: bool) -> list[dict[str, object]]:
    """Attention of one step of all layers, pages scattered: by the cache's dtype, against plain."""
    results = []
    # sequences, new tokens, context, window
    shapes = [(1, 1, 256, 0), (32, 1, 256, 0), (16, 5, 260, 0), (1, 256, 256, 0)]
    if not quick:
        shapes += [(1, 1, 4096, 0), (8, 1, 1024, 0), (1, 128, 1024, 0), (1, 1024, 1024, 0)]
        shapes += [(110, 1, 256, 0), (32, 1, 1024, 0), (64, 1, 512, 0), (32, 1, 1024, 256)]
    for sequences, new, context, window in shapes:
        steps = {name: Step(sequences, new, context, dtype) for name, dtype in CACHES.items()}
        q = torch.randn(sequences * new, HEADS, HEAD_DIM).to(DTYPE)

        def attend(step: Step, q: torch.Tensor = q, window: int = window) -> None:
            for cache in step.caches:
                ops.paged_attention(q, cache, step.metadata, HEAD_DIM**-0.5, window)

        def write(step: Step, k: torch.Tensor = q[:, :KV_HEADS]) -> None:
            for cache in step.caches:
                ops.write_kv(k, k, cache, step.metadata.slots)

        repeats = 5 if new > 1 else 7
        candidates: Candidates = {
            f"native, {name} cache": partial(attend, step) for name, step in steps.items()
        }
        candidates["plain"] = plainly(partial(attend, steps["bf16"]))
        times = race(candidates, repeats)
        writes = race({name: partial(write, step) for name, step in steps.items()}, repeats)
        results.append(
            {
                "sequences": sequences,
                "new": new,
                "context": context,
                "window": window,
                "times": times,
                "write_times": writes,
            }
        )
        seen = f" seeing {window}" if window else ""
        title = f"x{LAYERS} layers, {sequences} seqs, {new} new of {context}{seen}"
        show(f"attention {title}", times)
        show(f"cache write {title}", writes)
    return results


class Step:
    """Caches and layout of one step of equal sequences."""

    def __init__(
        self, sequences: int, new: int, context: int, cache_dtype: torch.dtype = DTYPE
    ) -> None:
        per_sequence = -(-context // BLOCK)
        blocks = sequences * per_sequence
        tables = torch.randperm(blocks).view(sequences, per_sequence).tolist()
        self.metadata = ops.build_attention_metadata(
            tables, [new] * sequences, [context] * sequences, BLOCK
        )
        # Every slot is written, so that quantized caches hold what they would in service.
        shape = (blocks, KV_HEADS, BLOCK, HEAD_DIM)
        tokens = torch.arange(blocks * BLOCK)
        heads = torch.randn(blocks * BLOCK, 2 * KV_HEADS, HEAD_DIM).to(DTYPE)
        self.caches = []
        for _ in range(LAYERS):
            cache = ops.LayerCache.allocate(shape, cache_dtype)
            ops.write_kv(heads[:, :KV_HEADS], heads[:, KV_HEADS:], cache, tokens)
            self.caches.append(cache)
        positions = torch.arange(context - new, context)
        self.positions = positions.repeat(sequences)
        self.ids = torch.randint(0, VOCABULARY, (sequences * new,))
        self.last = torch.arange(1, sequences + 1) * new - 1


class Decoder:
    """The decoder's operations in order, on random weights; what a model runner would call."""

    def __init__(self, kind: str) -> None:
        rows = (HEADS + 2 * KV_HEADS) * HEAD_DIM
        self.embedding = ops.pack_dense((torch.randn(VOCABULARY, HIDDEN) * 0.05).to(DTYPE))
        self.layers = [
            (
                pack(kind, rows, HIDDEN),
                pack(kind, HIDDEN, HEADS * HEAD_DIM),
                pack(kind, 2 * INTERMEDIATE, HIDDEN),
                pack(kind, HIDDEN, INTERMEDIATE),
            )
            for _ in range(LAYERS)
        ]
        self.norm = torch.ones(HIDDEN, dtype=DTYPE)
        self.angles = torch.rand(8192, HEAD_DIM)

    def run(self, step: Step) -> torch.Tensor:
        """Logits of every sequence's last token."""
        x = ops.embedding(step.ids, self.embedding)
        residual = torch.zeros_like(x)
        for (qkv, out, gate_up, down), cache in zip(self.layers, step.caches, strict=True):
            x, residual = ops.add_rms_norm(x, residual, self.norm, 1e-5)
            heads = ops.linear(x, qkv).view(x.shape[0], -1, HEAD_DIM)
            q, k, v = heads.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
            ops.rotary_embedding(q, k, step.positions, self.angles)
            ops.write_kv(k, v, cache, step.metadata.slots)
            x = ops.paged_attention(q, cache, step.metadata, HEAD_DIM**-0.5)
            x = ops.linear(x.view(x.shape[0], -1), out)
            x, residual = ops.add_rms_norm(x, residual, self.norm, 1e-5)
            x = ops.linear(ops.silu_and_mul(ops.linear(x, gate_up)), down)
        x, _ = ops.add_rms_norm(x, residual, self.norm, 1e-5)
        return ops.linear(x[step.last], self.embedding)


def decoder_steps(quick: bool) -> list[dict[str, object]]:
    """Whole steps of the 135M decoder by weight format, against plain PyTorch in bf16."""
    with cpu.without_native():
        plain = Decoder("dense")
    decoders = {kind: Decoder(kind) for kind in KINDS}
    results = []
    shapes = [(1, 1, 256), (32, 1, 256), (1, 256, 256)]
    if not quick:
        shapes += [(8, 1, 256), (1, 1024, 1024)]
    for sequences, new, context in shapes:
        step = Step(sequences, new, context)
        candidates: Candidates = {"plain bf16": plainly(lambda step=step: plain.run(step))}
        for kind, decoder in decoders.items():
            candidates[kind] = lambda step=step, decoder=decoder: decoder.run(step)  # type: ignore[misc]
        times = race(candidates, 5 if new > 1 else 11)
        results.append({"sequences": sequences, "new": new, "context": context, "times": times})
        show(f"135M step, {sequences} seqs, {new} new of {context}", times)
    return results


def small_operations() -> list[dict[str, object]]:
    """Norm, activation and rotary embedding of one decode row, 100 calls each."""
    x, residual = torch.randn(1, HIDDEN).to(DTYPE), torch.zeros(1, HIDDEN, dtype=DTYPE)
    weight, gated = torch.ones(HIDDEN, dtype=DTYPE), torch.randn(1, 2 * INTERMEDIATE).to(DTYPE)
    q, k = torch.randn(1, HEADS, HEAD_DIM).to(DTYPE), torch.randn(1, KV_HEADS, HEAD_DIM).to(DTYPE)
    position, angles = torch.tensor([7]), torch.rand(64, HEAD_DIM)
    runs: Candidates = {
        "add_rms_norm": lambda: ops.add_rms_norm(x, residual, weight, 1e-5),
        "silu_and_mul": lambda: ops.silu_and_mul(gated),
        "rotary_embedding": lambda: ops.rotary_embedding(q, k, position, angles),
    }
    results = []
    for name, run in runs.items():

        def many(run: Callable[[], object] = run) -> None:
            for _ in range(100):
                run()

        times = race({"native": many, "plain": plainly(many)}, 9)
        results.append({"operation": name, "calls": 100, "times": times})
        show(f"{name} x100", times)
    return results


def show(title: str, times: dict[str, dict[str, float]]) -> None:
    """One line per measurement."""
    shown = "  ".join(
        f"{name} {t['median_ms']:.3f} (min {t['min_ms']:.3f})" for name, t in times.items()
    )
    print(f"{title}: {shown} ms", flush=True)


CACHES = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
KINDS = ("dense", "int8", "int4")


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    options = parser.parse_args()
    torch.manual_seed(0)
    status = cpu.native_status()
    print(f"native kernels: {status.reason}", flush=True)
    record: dict[str, object] = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "native": status.reason,
    }
    found = limits.measure_limits("cpu")
    record["limits"] = {
        "memory_bandwidth": found.memory_bandwidth,
        "matmul_rate": found.matmul_rate,
        "call_cost": found.call_cost,
    }
    print(f"limits: {record['limits']}", flush=True)
    with torch.inference_mode():
        record["small_operations"] = small_operations()
        record["decoder_steps"] = decoder_steps(options.quick)
        gc.collect()
        record["attention"] = attention(options.quick)
        record["linears"] = linears(options.quick)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = options.out.with_suffix(".partial")
        unfinished.write_text(json.dumps(record, indent=1) + "\n")
        unfinished.replace(options.out)


if __name__ == "__main__":
    main()
