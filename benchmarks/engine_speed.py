"""The bundled engine against transformers on a 135M Llama with random weights, in one run.

Contenders take turns within each round, so that what else the machine does falls on all of them;
reported are medians over rounds, their quartiles, and the median of the per-round ratios.

    python -m benchmarks.engine_speed --out benchmarks/results/<machine>/engine_speed.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from engine import SamplingParams
from engine.config import EngineConfig
from engine.engine import Engine
from engine.llm import LLM
from engine.loading import load_model
from engine.step_record import StepRecord

LLAMA_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
TINY = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
CONTEXT = 256
DECODE_STEPS = 12
METHODS = ("none", "int8", "int4")
Timer = Callable[[], float]
"""Runs one round of a contender and returns seconds a step."""


def save_random_llama(folder: Path, shape: dict[str, Any], dtype: torch.dtype) -> None:
    """Save a Llama of this shape with random weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**shape, bos_token_id=None, eos_token_id=None)
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(folder)


def random_prompts(count: int, length: int) -> list[list[int]]:
    """Prompts that share nothing."""
    return torch.randint(LLAMA_135M["vocab_size"], (count, length)).tolist()


class Peer:
    """transformers with its own cache; forward passes and argmax only, nothing of `generate`."""

    def __init__(self, folder: Path) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16
        ).eval()

    @torch.inference_mode()
    def prefill(self, prompts: list[list[int]]) -> tuple[Any, float]:
        """The cache after a batch of equally long prompts, and seconds until the first tokens."""
        ids = torch.tensor(prompts)
        start = time.perf_counter()
        out = self.model(ids, use_cache=True, logits_to_keep=1)
        out.logits[:, -1].argmax(-1).tolist()
        return out.past_key_values, time.perf_counter() - start

    @torch.inference_mode()
    def decode(self, cache: Any, batch: int) -> float:
        """Median seconds of a step; the context passes CONTEXT half-way."""
        cache.crop(CONTEXT - DECODE_STEPS // 2 - cache.get_seq_length())  # negative: so many less
        tokens = torch.zeros(batch, 1, dtype=torch.long)
        times = []
        for _ in range(DECODE_STEPS):
            start = time.perf_counter()
            out = self.model(tokens, past_key_values=cache, use_cache=True)
            tokens = out.logits[:, -1].argmax(-1, keepdim=True)
            tokens.tolist()
            times.append(time.perf_counter() - start)
        return statistics.median(times)


class Ours:
    """The whole engine: scheduling, inputs, forward pass, sampling and outputs."""

    def __init__(self, folder: Path, quantization: str) -> None:
        config = EngineConfig(
            model=str(folder),
            device="cpu",
            quantization=quantization,
            max_model_len=512,
            kv_cache_memory_bytes=640 << 20,
            max_num_batched_tokens=4096,
            enable_prefix_caching=False,
        )
        self.records: list[StepRecord] = []
        self.engine: Engine = load_model(config).engine(config, on_step=self.records.append)

    def prefill(self, prompts: list[list[int]]) -> float:
        """Seconds until every prompt has its first token."""
        for index, prompt in enumerate(prompts):
            sampling = SamplingParams(temperature=0.0, max_tokens=4 * DECODE_STEPS, ignore_eos=True)
            self.engine.add(str(index), prompt, sampling)
        start = time.perf_counter()
        while self.engine.scheduler.waiting or not self.engine.scheduler.running:
            self.engine.step()
        return time.perf_counter() - start

    def drain(self) -> None:
        """Take out what still runs."""
        self.engine.abort_all()
        self.engine.step()

    def decode(self, batch: int) -> float:
        """Median seconds of a step; the context passes CONTEXT half-way."""
        self.prefill(random_prompts(batch, CONTEXT - DECODE_STEPS // 2))
        while self.records[-1].decode_sequences < batch:
            self.engine.step()
        self.records.clear()
        times = []
        for _ in range(DECODE_STEPS):
            start = time.perf_counter()
            self.engine.step()
            times.append(time.perf_counter() - start)
        assert all(record.decode_sequences == batch for record in self.records)
        self.drain()
        return statistics.median(times)


def compare(contenders: dict[str, Timer], rounds: int) -> dict[str, Any]:
    """Seconds of each contender, and how many times faster than the first the others are."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, timer in contenders.items():
            seconds = timer()
            if number:  # the first round warms up
                times[name].append(seconds)
    peer = next(iter(contenders))
    out: dict[str, Any] = {}
    for name, seconds_of in times.items():
        quartiles = statistics.quantiles(seconds_of, n=4)
        out[name] = {
            "median_s": statistics.median(seconds_of),
            "quartiles_s": [quartiles[0], quartiles[2]],
            "best_s": min(seconds_of),
        }
        if name != peer:
            ratios = [a / b for a, b in zip(times[peer], seconds_of, strict=True)]
            out[name]["speedup"] = statistics.median(ratios)
            out[name]["speedup_of_best"] = min(times[peer]) / min(seconds_of)
    return out


def speed(folder: Path, rounds: int) -> dict[str, Any]:
    """Decode and prefill of all contenders, and the engine's own share of a step."""
    peer = Peer(folder)
    ours = {method: Ours(folder, method) for method in METHODS}
    out: dict[str, Any] = {}
    for batch in (1, 32):
        cache = peer.prefill(random_prompts(batch, CONTEXT))[0]

        def decode_peer(cache: Any = cache, batch: int = batch) -> float:
            return peer.decode(cache, batch)

        contenders: dict[str, Timer] = {"transformers": decode_peer}
        for method, contender in ours.items():
            contenders[method] = lambda c=contender, b=batch: c.decode(b)  # type: ignore[misc]
        out[f"decode_batch_{batch}"] = compare(contenders, rounds)
        say(f"decode, batch {batch}", out[f"decode_batch_{batch}"])

    def prefill_ours(contender: Ours, batch: int) -> float:
        seconds = contender.prefill(random_prompts(batch, CONTEXT))
        contender.drain()
        return seconds

    for batch in (1, 8):
        contenders = {
            "transformers": lambda b=batch: peer.prefill(random_prompts(b, CONTEXT))[1]  # type: ignore[misc]
        }
        for method, contender in ours.items():
            contenders[method] = lambda c=contender, b=batch: prefill_ours(c, b)  # type: ignore[misc]
        out[f"prefill_{batch}x{CONTEXT}"] = compare(contenders, rounds)
        say(f"prefill, {batch} x {CONTEXT}", out[f"prefill_{batch}x{CONTEXT}"])

    contender = ours["none"]
    contender.decode(64)
    steps = list(contender.records)
    out["scheduler_share_batch_64"] = sum(s.scheduler_seconds for s in steps) / sum(
        s.seconds for s in steps
    )
    out["host_share_batch_64"] = sum(s.host_seconds for s in steps) / sum(s.seconds for s in steps)
    return out


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


def anonymous_bytes() -> int:
    """Resident memory that is no file's: what was allocated, without code and mapped weights."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status does not tell RssAnon; run this on Linux")


def growth(folder: Path, requests: int) -> dict[str, Any]:
    """Resident memory while many short requests come and go; the first tenth warms up."""
    llm = LLM(str(folder), device="cpu", num_threads=1, kv_cache_memory_bytes=8 << 20)
    generator = torch.Generator().manual_seed(0)
    samples = []
    batch = max(requests // 10, 1)
    for _ in range(11):
        lengths = torch.randint(1, 24, (batch,), generator=generator).tolist()
        prompts = [torch.randint(1024, (n,), generator=generator).tolist() for n in lengths]
        llm.generate(prompts, SamplingParams(max_tokens=3, temperature=0.0))
        samples.append(resident_bytes())
    return {
        "requests": batch * 10,
        "resident_bytes": samples,
        "growth_bytes": samples[-1] - samples[0],
    }


def load_memory(folder: Path) -> dict[str, Any]:
    """What loading takes at its peak, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.engine_speed", "--load-only", str(folder)],
        check=True,
        capture_output=True,
        text=True,
    )
    return dict(json.loads(done.stdout))


def load_only(folder: Path) -> dict[str, Any]:
    """The child of `load_memory`."""
    torch.nn.functional.linear(torch.zeros(1, 8), torch.zeros(8, 8))
    before, anonymous = resident_bytes(), anonymous_bytes()
    cache_bytes = 64 << 20
    loaded = load_model(
        EngineConfig(
            model=str(folder),
            device="cpu",
            max_model_len=512,
            kv_cache_memory_bytes=cache_bytes,
        )
    )
    return {
        "weights_bytes": loaded.runner.decoder.nbytes,
        "kv_cache_bytes": loaded.runner.cache.nbytes,
        "peak_growth_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
        "resident_growth_bytes": resident_bytes() - before,
        "anonymous_growth_bytes": anonymous_bytes() - anonymous,
    }


def say(title: str, results: dict[str, Any]) -> None:
    """Tell a comparison to a person."""
    print(title, file=sys.stderr)
    for name, r in results.items():
        times = f"{r['median_s'] * 1e3:8.2f} ms (best {r['best_s'] * 1e3:.2f})"
        faster = f"  {r['speedup']:.2f}x" if "speedup" in r else ""
        print(f"  {name:13s}{times}{faster}", file=sys.stderr)


def main() -> None:
    """Run everything and print the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--load-only", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load_only:
        print(json.dumps(load_only(args.load_only)))
        return
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        big, tiny = Path(temporary) / "135m", Path(temporary) / "tiny"
        save_random_llama(big, LLAMA_135M, torch.bfloat16)
        save_random_llama(tiny, TINY, torch.float32)
        results: dict[str, Any] = {
            "machine": {
                "processor": platform.processor() or platform.machine(),
                "cores": os.cpu_count(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "load_average": os.getloadavg()[0],
            },
            "shape": LLAMA_135M,
            "context": CONTEXT,
            "load": load_memory(big),
            "growth": growth(tiny, args.requests),
            **speed(big, args.rounds),
        }
    text = json.dumps(results, indent=1)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
