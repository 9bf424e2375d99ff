"""One linear layer in every weight format against bf16, by rows of activations, in one run.

    python -m benchmarks.quantization_speed [--quick]
        [--out benchmarks/results/<machine>/quantization_speed.json]

Formats take turns within each round, so that what else the machine does falls on all of them.
Reported are medians and quartiles over rounds, and the median of the per-round ratios of bf16's
time to the format's: above 1 is faster than bf16. Weights rotate through more copies than the
nearer caches hold. Activations are normal, so LLM.int8() meets no outliers in `llm_int8` and about
one element in a hundred in `llm_int8 1%`.
"""

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.kernel_speed import Candidates, take_turns
from kernels import cpu, ops

DTYPE = torch.bfloat16
GROUP = 64
# A layer of an 8B model, and the two of the embedded model that hold the most weights.
SHAPES = ((4096, 4096), (2048, 384), (384, 1024))
ROWS = (1, 8, 32, 256)
DECODE_ROWS, PREFILL_ROWS = (1, 8), (256,)
BASELINE = "bf16"
CACHED_BYTES = 64 << 20
# The share of a standard normal at or beyond this magnitude is one in a hundred.
ONE_PERCENT = 2.576
Packer = Callable[[int, int], ops.LinearWeight]


def nibbles(n: int, k: int) -> torch.Tensor:
    """Random integers 0..15 [n, k]."""
    return torch.randint(0, 16, (n, k), dtype=torch.uint8)


def int8(n: int, k: int) -> torch.Tensor:
    """Random int8 [n, k]."""
    return torch.randint(-127, 128, (n, k), dtype=torch.int8)


def scales(n: int, k: int) -> torch.Tensor:
    """Random float32 scales of groups, which half precision does not hold exactly."""
    return torch.rand(n, k // GROUP) * 0.01 + 0.001


def zeros(n: int, k: int) -> torch.Tensor:
    """Random integer zeros of groups, as asymmetric int4 has them."""
    return torch.randint(0, 16, (n, k // GROUP)).float()


def fp8(n: int, k: int) -> torch.Tensor:
    """Random e4m3 [n, k]."""
    return torch.randn(n, k).to(torch.float8_e4m3fn)


FORMATS: dict[str, Packer] = {
    BASELINE: lambda n, k: ops.pack_dense((torch.randn(n, k) * 0.05).to(DTYPE)),
    "int8 W8A8": lambda n, k: ops.pack_int8(int8(n, k), torch.rand(n)),
    "llm_int8": lambda n, k: ops.pack_int8(int8(n, k), torch.rand(n), None, 6.0),
    "llm_int8 1%": lambda n, k: ops.pack_int8(int8(n, k), torch.rand(n), None, ONE_PERCENT),
    "int4 g64": lambda n, k: ops.pack_int4(nibbles(n, k), scales(n, k), zeros(n, k), GROUP),
    "int8 g64": lambda n, k: ops.pack_int8_groups(
        int8(n, k), scales(n, k), torch.zeros(n, k // GROUP), GROUP
    ),
    "fp8": lambda n, k: ops.pack_fp8(fp8(n, k), torch.rand(n)),
    "fp8 weight-only": lambda n, k: ops.pack_fp8(fp8(n, k), torch.rand(n), activations="none"),
    "fp8 blocks": lambda n, k: ops.pack_fp8(
        fp8(n, k), torch.rand(-(-n // 128), -(-k // 128)), None, (128, 128)
    ),
    "nf4": lambda n, k: ops.pack_table4(nibbles(n, k), scales(n, k), torch.randn(16), GROUP),
}


def measure(k: int, rows: int, weights: dict[str, list[ops.LinearWeight]]) -> Candidates:
    """What one round runs: each format's copies once over the same activations."""
    x = torch.randn(rows, k).to(DTYPE)
    dense = [ops.dequantize(weight) for weight in weights[BASELINE]]

    def call(packed: list[ops.LinearWeight]) -> Callable[[], object]:
        return lambda: [ops.linear(x, weight) for weight in packed]

    candidates: Candidates = {name: call(packed) for name, packed in weights.items()}
    candidates["F.linear bf16"] = lambda: [F.linear(x, weight) for weight in dense]
    return candidates


def summarize(times: dict[str, list[float]], copies: int) -> dict[str, dict[str, float]]:
    """Milliseconds a layer and the speed against bf16, of each format."""
    summary = {}
    for name, rounds in times.items():
        low, median, high = statistics.quantiles(rounds, n=4)
        ratios = [base / own for base, own in zip(times[BASELINE], rounds, strict=True)]
        summary[name] = {
            "median_ms": median / copies,
            "quartile_low_ms": low / copies,
            "quartile_high_ms": high / copies,
            "min_ms": min(rounds) / copies,
            "speed_against_bf16": statistics.median(ratios),
        }
    return summary


def measure_shape(n: int, k: int, rounds: int) -> list[dict[str, object]]:
    """All formats and numbers of rows on weights [n, k]."""
    copies = max(2, CACHED_BYTES // (n * k * 2))
    weights = {name: [pack(n, k) for _ in range(copies)] for name, pack in FORMATS.items()}
    results: list[dict[str, object]] = []
    for rows in ROWS:
        candidates = measure(k, rows, weights)
        formats = summarize(take_turns(candidates, rounds), copies)
        results.append({"n": n, "k": k, "rows": rows, "formats": formats})
        print(f"{n}x{k}, {rows} rows", flush=True)
        for name, figures in formats.items():
            print(
                f"  {name:16} {figures['median_ms']:8.3f} ms"
                f" ({figures['quartile_low_ms']:.3f} .. {figures['quartile_high_ms']:.3f})"
                f"  {figures['speed_against_bf16']:5.2f} x bf16",
                flush=True,
            )
    return results


def slower_everywhere(results: list[dict[str, object]]) -> list[str]:
    """Formats slower than bf16 at decode and at prefill both, by shape."""

    def slower(shape: tuple[int, int], name: str, among: tuple[int, ...]) -> bool:
        speeds = [
            entry["formats"][name]["speed_against_bf16"]  # type: ignore[index]
            for entry in results
            if (entry["n"], entry["k"]) == shape and entry["rows"] in among
        ]
        return max(speeds) < 1

    return [
        f"{name} at {shape[0]}x{shape[1]}"
        for shape in SHAPES
        for name in FORMATS
        if slower(shape, name, DECODE_ROWS) and slower(shape, name, PREFILL_ROWS)
    ]


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    options = parser.parse_args()
    torch.manual_seed(0)
    status = cpu.native_status()
    rounds = 7 if options.quick else 41
    results: list[dict[str, object]] = []
    with torch.inference_mode():
        for n, k in SHAPES:
            results += measure_shape(n, k, rounds)
    slow = slower_everywhere(results)
    print(f"slower than bf16 at decode and prefill: {', '.join(slow) or 'none'}")
    record = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "native": status.reason,
        "rounds": rounds,
        "linears": results,
        "slower_than_bf16_at_decode_and_prefill": slow,
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        partial = options.out.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        partial.replace(options.out)


if __name__ == "__main__":
    main()
