"""What profiling costs a step: the same steps with and without it, in turn.

One engine decodes a steady batch. Blocks of steps with the records of a profile (and, on a GPU, its
sampler) take turns with blocks without; which of a pair comes first changes from pair to pair, so
that the growing context and what else the machine does fall on both. Reported is the median over
pairs of how much longer a step took, with its bootstrap interval.

    python -m benchmarks.profiling_overhead --out profiling_overhead.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autotune.embedded import TARGET
from autotune.profiling.gpu_sampler import GpuSampler, visible_uuids
from benchmarks.engine_speed import LLAMA_135M, save_random_llama
from engine.config import EngineConfig
from engine.engine import Engine
from engine.loading import load_model
from engine.request import SamplingParams
from engine.step_record import StepRecord

BATCHES = (1, 8, 32)
CONTEXT = 256
# Short, so that a disturbance falls into few pairs; a GPU's sampler must come by within one.
PAIRS, BLOCK = (30, 25) if torch.cuda.is_available() else (150, 5)


def block_seconds(engine: Engine, steps: int, *, profiled: bool) -> float:
    """Seconds of a step, a mean over a block of them."""
    records: list[StepRecord] = []
    engine.on_step = records.append if profiled else None
    sampled = profiled and torch.cuda.is_available()
    with GpuSampler(visible_uuids(1)) if sampled else contextlib.nullcontext():
        start = time.perf_counter()
        for _ in range(steps):
            engine.step()
        seconds = (time.perf_counter() - start) / steps
    engine.on_step = None
    return seconds


def fill(engine: Engine, batch: int, steps: int, vocab_size: int) -> None:
    """Have `batch` sequences decode, with room for so many steps."""
    generator = torch.Generator().manual_seed(0)
    for index in range(batch):
        prompt = torch.randint(vocab_size, (CONTEXT,), generator=generator).tolist()
        sampling = SamplingParams(temperature=0.0, max_tokens=steps, ignore_eos=True)
        engine.add(str(index), prompt, sampling)
    while engine.scheduler.waiting or len(engine.scheduler.running) < batch:
        engine.step()
    engine.step()  # the last prompt's end


def compare(engine: Engine, batch: int, pairs: int, steps: int, vocab_size: int) -> dict[str, Any]:
    """Pairs of blocks at one batch size."""
    fill(engine, batch, (2 * pairs + 4) * steps, vocab_size)
    block_seconds(engine, steps, profiled=True)  # what is met for the first time takes longer
    block_seconds(engine, steps, profiled=False)
    off, on = [], []
    for pair in range(pairs):
        for profiled in (True, False) if pair % 2 else (False, True):
            (on if profiled else off).append(block_seconds(engine, steps, profiled=profiled))
    engine.abort_all()
    engine.step()
    added = np.array(on) / np.array(off) - 1.0
    drawn = np.random.default_rng(0).choice(added, size=(2000, len(added)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975]).tolist()
    return {
        "batch": batch,
        "pairs": pairs,
        "steps_a_block": steps,
        "without_s": statistics.median(off),
        "with_s": statistics.median(on),
        "overhead": float(np.median(added)),
        "overhead_low": low,
        "overhead_high": high,
    }


def of_model(folder: str, pairs: int, steps: int, threads: int | None) -> list[dict[str, Any]]:
    """All batch sizes on one model."""
    config = EngineConfig(model=folder, max_model_len=2048, num_threads=threads)
    loaded = load_model(config)
    # A sequence must not reach its limit.
    steps = min(steps, (loaded.runner.max_model_len - CONTEXT) // (2 * pairs + 4))
    try:
        engine = loaded.engine(config)
        return [compare(engine, b, pairs, steps, loaded.spec.vocab_size) for b in BATCHES]
    finally:
        loaded.close()


def main() -> None:
    """Run everything and print the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--steps", type=int, default=BLOCK, help="of a block")
    parser.add_argument("--threads", type=int, help="of the engine; default: all cores")
    parser.add_argument("--models", default="embedded,135m")
    args = parser.parse_args()
    wanted = args.models.split(",")
    results: dict[str, Any] = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "torch": torch.__version__,
            "load_average": os.getloadavg()[0],
        },
        "context": CONTEXT,
        "models": {},
    }
    with tempfile.TemporaryDirectory() as temporary:
        for name in wanted:
            folder = str(TARGET)
            if name == "135m":
                folder = f"{temporary}/135m"
                save_random_llama(Path(folder), LLAMA_135M, torch.bfloat16)
            results["models"][name] = of_model(folder, args.pairs, args.steps, args.threads)
            for r in results["models"][name]:
                print(
                    f"{name:9} batch {r['batch']:3}: {r['without_s'] * 1e3:8.3f} ms, profiled "
                    f"{r['overhead']:+.2%} ({r['overhead_low']:+.2%} to {r['overhead_high']:+.2%})",
                    file=sys.stderr,
                )
    worst = max(r["overhead"] for rows in results["models"].values() for r in rows)
    results["worst_overhead"] = worst
    text = json.dumps(results, indent=1)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
