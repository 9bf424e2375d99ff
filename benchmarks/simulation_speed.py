"""How fast the simulator is: requests a second of one core, and the seconds of a plan.

Requests of 128 tokens and 500 tokens of output arrive at random at one engine, at rates that bring
about batches of different sizes: the larger the batch, the more often somebody comes or goes, and
the less can be taken at once. Steps cost what a model of 8 billion parameters would take on a large
GPU by the roofline. Repeats take turns; the fastest tells what the code takes, the median what this
machine gave.

    python -m benchmarks.simulation_speed [--out simulation_speed.json] [--no-plan]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from autotune.hardware.detect import describe_hardware
from autotune.hardware.versions import library_versions
from autotune.metrics import compute_metrics
from autotune.predict.replay import replay
from autotune.predict.step_cost import StepWork
from autotune.predict.step_times import DecodeLine
from autotune.records import utc_now
from autotune.workload.materialise import LoadRequest
from engine.config import EngineConfig
from engine.engine import CacheShape

PROMPT, OUTPUT = 128, 500
# Mean batches that are aimed at; None offers all requests at once.
BATCHES = (1, 4, 16, 64, 256, None)
REQUESTS = 2000
REPEATS = 5
GPUS = "h100,h200,l40s,a100-80gb"
# https://huggingface.co/meta-llama/Meta-Llama-3-8B, config.json
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


class RooflineCost:
    """Steps of 8 billion parameters in 16 bits at 3 TB/s and 500 TFLOP/s; 128 KiB of cache a token.

    Seconds are the larger of reading the weights and multiplying by them, and reading the cache.
    """

    def decode_line(self, sequences: int) -> DecodeLine | None:
        """Seconds of steps of decodes, by the cached tokens that they see."""
        works = [StepWork(sequences, 0, sequences, sequences, seen, 0, 0) for seen in (0, 4096)]
        seconds = [self.device_seconds(work) + self.host_seconds(work) for work in works]
        return DecodeLine((0.0, 4096.0), tuple(seconds))

    def device_seconds(self, work: StepWork) -> float:
        """Seconds on the device."""
        linear = max(16e9 / 3e12, 16e9 * work.rows / 500e12)
        cache = (work.decode_kv_tokens + work.prefill_kv_tokens) * 131072 / 3e12
        return linear + cache + work.prefill_pairs * 5e-10

    def host_seconds(self, work: StepWork) -> float:
        """Seconds on the host."""
        return 2e-4 + 2e-6 * work.sequences


def load(batch: int | None, count: int) -> tuple[list[LoadRequest], EngineConfig]:
    """Requests that bring about a mean batch, and an engine that holds it."""
    rng = random.Random(batch or 0)
    seats = batch or 256
    cost = RooflineCost()
    decodes = StepWork(seats, 0, seats, seats, seats * (PROMPT + OUTPUT / 2), 0, 0)
    step = cost.device_seconds(decodes) + cost.host_seconds(decodes)
    rate = seats / (step * OUTPUT)
    now, requests = 0.0, []
    for number in range(count):
        now += rng.expovariate(rate) if batch else 0.0
        prompt = tuple(rng.randrange(1 << 17) for _ in range(PROMPT))
        requests.append(LoadRequest(f"{number}", now, prompt, OUTPUT))
    return requests, EngineConfig(max_num_seqs=4 * seats, max_num_batched_tokens=8192)


def played(requests: list[LoadRequest], config: EngineConfig) -> dict[str, float]:
    """Seconds of simulating a load once, and what it was."""
    shape = CacheShape(num_blocks=100_000, max_model_len=4096)
    wall, core = time.perf_counter(), time.process_time()
    found = replay(requests, config, RooflineCost(), shape, drain_limit=1e9)
    wall, core = time.perf_counter() - wall, time.process_time() - core
    began = time.process_time()
    compute_metrics(
        found.records,
        None,
        duration=found.duration,
        config=config,
        load_delivered=True,
        load_note=None,
        resamples=0,
    )
    assert all(record.completed for record in found.records)
    return {
        "wall_s": wall,
        "core_s": core,
        "metrics_core_s": time.process_time() - began,
        "mean_batch": found.totals.sequences / found.totals.steps,
        "steps": found.totals.steps,
    }


def speeds() -> list[dict[str, Any]]:
    """Simulated requests a second by batch size."""
    loads = [(batch, *load(batch, REQUESTS)) for batch in BATCHES]
    runs: list[list[dict[str, float]]] = [[] for _ in loads]
    for _ in range(REPEATS):
        for place, (_, requests, config) in enumerate(loads):
            runs[place].append(played(requests, config))
    told = []
    for (batch, requests, _), repeats in zip(loads, runs, strict=True):
        fastest = min(run["core_s"] for run in repeats)
        wall = statistics.median(run["wall_s"] for run in repeats)
        told.append(
            {
                "batch": batch,
                "mean_batch": repeats[0]["mean_batch"],
                "requests": len(requests),
                "steps": repeats[0]["steps"],
                "requests_per_core_second": len(requests) / fastest,
                "requests_per_second_median": len(requests) / wall,
                "tokens_per_core_second": len(requests) * OUTPUT / fastest,
                "metrics_share": min(r["metrics_core_s"] for r in repeats) / fastest,
                "repeats": repeats,
            }
        )
        name = "all at once" if batch is None else f"batch {told[-1]['mean_batch']:.1f}"
        print(
            f"{name:<12} {told[-1]['requests_per_core_second']:>9,.0f} requests a core second, "
            f"{told[-1]['requests_per_second_median']:>9,.0f} a second on the median; "
            f"metrics take {told[-1]['metrics_share']:.0%} on top"
        )
    return told


def plan_seconds(repeats: int = 3) -> dict[str, Any]:
    """Seconds of `autotune plan` over four GPU types, as a user waits for it."""
    command = [
        *(sys.executable, "-m", "autotune.cli.main", "plan", "--workload", "chat"),
        *("--rate", "50", "--slo", "ttft<500ms,tpot<50ms", "--gpus", GPUS, "--json"),
    ]
    taken, core, options = [], [], 0
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA_8B))
        for _ in range(repeats):
            began, before = time.perf_counter(), os.times()
            done = subprocess.run(
                [*command, "--model", folder], check=False, capture_output=True, text=True
            )
            taken.append(time.perf_counter() - began)
            after = os.times()
            core.append(
                (after.children_user - before.children_user)
                + (after.children_system - before.children_system)
            )
            if done.returncode not in (0, 4):
                raise SystemExit(f"autotune plan failed: {done.stderr.strip()}")
            options = len(json.loads(done.stdout)["options"])
    print(
        f"plan over {GPUS}: {statistics.median(taken):.1f} s ({min(core):.1f} s of one core), "
        f"{options} options"
    )
    return {"gpus": GPUS, "options": options, "seconds": taken, "core_s": core}


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    report = {
        "machine": describe_hardware("cpu"),
        "versions": library_versions(),
        "at": utc_now(),
        "prompt_tokens": PROMPT,
        "output_tokens": OUTPUT,
        "speeds": speeds(),
        "plan": plan_seconds() if options.plan else None,
    }
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
