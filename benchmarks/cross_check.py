"""Our load generator against `vllm bench serve` and guidellm: one server, one load, each in turn.

The same arrivals and lengths go to the server from each tool, with prompts that share nothing, in
rounds that begin with another tool each time. What a tool calls by another name is translated (the
table in `autotune.metrics`), and the ratio of ours to theirs is reported for each metric: its
median over rounds, and whether it lies within 5% of 1.

A real server's own noise between two loads is often more than 5%. On `--paced`, a server whose
latencies are known, the tools are held against the truth too.

    python -m benchmarks.cross_check --vllm ENV/bin/vllm --guidellm ENV/bin/guidellm [--paced]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autotune.embedded import TARGET
from autotune.load.discover import Server, discover
from autotune.load.http_load import run_http_load
from autotune.metrics import compute_metrics
from autotune.slo import parse_slo
from autotune.workload.materialise import LoadRequest
from benchmarks import paced_server
from benchmarks.guidellm_run import run_guidellm
from benchmarks.server_process import WatchBeside, served, started

LATENCIES = ("ttft", "tpot", "itl", "e2e")
STATISTICS = ("mean", "p50", "p95", "p99")
RATES = ("output_tokens_per_s", "requests_per_s", "goodput_requests_per_s")
METRICS = (*(f"{name}_{statistic}" for name in LATENCIES for statistic in STATISTICS), *RATES)
AGREES = 0.05
Found = dict[str, float | None]


@dataclass(frozen=True, slots=True)
class Load:
    """Arrivals in seconds with the tokens of prompt and answer; limits of goodput in ms."""

    rows: tuple[tuple[float, int, int], ...]
    ttft_ms: float
    tpot_ms: float
    rate: float

    @property
    def slo(self) -> str:
        """The limits, as we write them."""
        return f"ttft<={self.ttft_ms:g}ms,tpot<={self.tpot_ms:g}ms"


def make_load(args: argparse.Namespace) -> Load:
    """Poisson arrivals, the first at 0, and lognormal lengths."""
    rng = np.random.default_rng(args.seed)
    arrivals = np.cumsum(rng.exponential(1 / args.rate, args.requests))
    arrivals -= arrivals[0]
    inputs = np.clip(rng.lognormal(np.log(args.prompt), 0.5, args.requests), 8, 1024).astype(int)
    outputs = np.clip(rng.lognormal(np.log(args.output), 0.5, args.requests), 4, 512).astype(int)
    rows = zip(arrivals.tolist(), inputs.tolist(), outputs.tolist(), strict=True)
    return Load(tuple(rows), args.ttft_ms, args.tpot_ms, args.rate)


def ours(server: Server, load: Load, seed: int) -> Found:
    """What our generator measures."""
    rng = np.random.default_rng([seed, 1])
    requests = [
        LoadRequest(str(i), at, tuple(rng.choice(server.vocabulary, inputs).tolist()), outputs)
        for i, (at, inputs, outputs) in enumerate(load.rows)
    ]
    slo = parse_slo(load.slo)
    result = run_http_load(server.endpoint, requests, slo=slo)
    metrics = compute_metrics(
        result.records,
        slo,
        duration=result.duration,
        config={},
        load_delivered=result.delivered,
        load_note=result.note,
        resamples=0,
    )
    found: Found = {name: metrics[name] for name in METRICS if name in metrics}
    for latency in LATENCIES:
        for statistic in STATISTICS:
            found[f"{latency}_{statistic}"] = metrics[latency][statistic]
    lags = [record.send - record.intended_send for record in result.records]
    return {**found, "completed": metrics["completed"], "send_lag_p99": np.percentile(lags, 99)}


def vllm_bench(program: Path, url: str, model: str, tokenizer: str, load: Load) -> Found:
    """What `vllm bench serve` measures, replaying the load as a timed trace."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trace = folder / "trace.jsonl"
        # A block of its own for each prompt, longer than any of them: nothing is shared.
        trace.write_text(
            "".join(
                json.dumps(
                    {"timestamp": at, "input_length": i, "output_length": o, "hash_ids": [number]}
                )
                + "\n"
                for number, (at, i, o) in enumerate(load.rows)
            )
        )
        run_tool(
            [
                *(str(program), "bench", "serve", "--backend", "openai", "--base-url", url),
                *("--endpoint", "/v1/completions", "--model", model, "--tokenizer", tokenizer),
                *("--dataset-name", "timed_trace", "--dataset-path", str(trace)),
                *("--timed-trace-chunk-hash-size", "100000"),
                *("--num-prompts", str(len(load.rows)), "--temperature", "0"),
                *("--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,95,99"),
                *("--goodput", f"ttft:{load.ttft_ms:g}", f"tpot:{load.tpot_ms:g}"),
                *("--save-result", "--result-dir", str(folder), "--result-filename", "r.json"),
                "--disable-tqdm",
            ]
        )
        result = json.loads((folder / "r.json").read_text())
    found: Found = {
        "output_tokens_per_s": result["output_throughput"],
        "requests_per_s": result["request_throughput"],
        "goodput_requests_per_s": result["request_goodput"],
        "completed": result["completed"],
    }
    for latency, theirs in (("ttft", "ttft"), ("tpot", "tpot"), ("itl", "itl"), ("e2e", "e2el")):
        found[f"{latency}_mean"] = result[f"mean_{theirs}_ms"] / 1e3
        for statistic in ("p50", "p95", "p99"):
            found[f"{latency}_{statistic}"] = result[f"{statistic}_{theirs}_ms"] / 1e3
    return found


def truth(load: Load) -> Found:
    """What the paced server's plan makes of the load, with nothing late."""
    arrivals, inputs, outputs = (np.asarray(column) for column in zip(*load.rows, strict=True))
    first = paced_server.FIRST_S + paced_server.PROMPT_TOKEN_S * inputs
    e2e = first + paced_server.GAP_S * (outputs - 1)
    gaps = np.full(2, paced_server.GAP_S)
    found: Found = {}
    for name, values in (("ttft", first), ("tpot", gaps), ("itl", gaps), ("e2e", e2e)):
        found[f"{name}_mean"] = float(values.mean())
        for statistic in (50, 95, 99):
            found[f"{name}_p{statistic}"] = float(np.percentile(values, statistic))
    duration = float((arrivals + e2e).max())
    found["output_tokens_per_s"] = float(outputs.sum()) / duration
    found["requests_per_s"] = len(outputs) / duration
    good = (first <= load.ttft_ms / 1e3) & (load.tpot_ms / 1e3 >= paced_server.GAP_S)
    found["goodput_requests_per_s"] = float(good.sum()) / duration
    return found


def run_tool(command: Sequence[str]) -> str:
    """Run a peer's command and return what it printed.

    Raises:
        RuntimeError: it failed; its last words are told.
    """
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {(done.stderr or done.stdout)[-2000:]}")
    return done.stdout


def compare(mine: Sequence[Found], theirs: Sequence[Found]) -> dict[str, Any]:
    """The ratio of ours to theirs by metric: median over rounds, each, and whether it is 1."""
    compared: dict[str, Any] = {}
    for name in METRICS:
        ratios = [
            a / b
            for a, b in ((m.get(name), t.get(name)) for m, t in zip(mine, theirs, strict=True))
            if a is not None and b
        ]
        if ratios:
            median = statistics.median(ratios)
            agrees = abs(median - 1) <= AGREES
            compared[name] = {"ratio": median, "rounds": ratios, "agrees": agrees}
    return compared


@contextmanager
def server_of(args: argparse.Namespace) -> Iterator[tuple[Server, int]]:
    """The server that was named, or one that is started; and its process, 0 if not known."""
    pid = 0
    with contextlib.ExitStack() as stack:
        url = args.url
        if args.paced:
            command = ["-m", "benchmarks.paced_server", "--model", str(TARGET)]
            process = stack.enter_context(started(command))
            url, pid = process.url, process.pid
        elif url is None:
            knobs = {"model": str(TARGET), "device": "cpu", "num_threads": args.threads}
            process = stack.enter_context(served(knobs))
            url, pid = process.url, process.pid
        yield discover(url, model=args.served_model), pid


def main() -> None:
    """Measure in turn, compare, and print the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--vllm", type=Path, help="the command vllm")
    parser.add_argument("--guidellm", type=Path, help="the command guidellm, 0.8 or newer")
    parser.add_argument("--url", help="a running server; by default one of ours is started")
    parser.add_argument("--served-model", help="its model's name, where it has several")
    parser.add_argument("--tokenizer", default=str(TARGET), help="folder of its tokenizer")
    parser.add_argument("--paced", action="store_true", help="on a server of known latencies")
    parser.add_argument("--threads", type=int, help="num_threads of our server")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rate", type=float, default=8.0)
    parser.add_argument("--prompt", type=int, default=128, help="median tokens of a prompt")
    parser.add_argument("--output", type=int, default=48, help="median tokens of an answer")
    parser.add_argument("--ttft-ms", type=float, default=150.0)
    parser.add_argument("--tpot-ms", type=float, default=100.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    load = make_load(args)
    rounds: dict[str, list[Found]] = {}
    others: list[float | None] = []
    with server_of(args) as (server, pid):
        url, model = server.endpoint.url, server.endpoint.model
        tools: dict[str, Callable[[int], Found]] = {"ours": lambda seed: ours(server, load, seed)}
        if args.vllm:
            tools["vllm"] = lambda _: vllm_bench(args.vllm, url, model, args.tokenizer, load)
        if args.guidellm:
            tools["guidellm"] = lambda _: run_guidellm(
                args.guidellm, run_tool, url, model, args.tokenizer, load
            )
        ours(server, load, args.rounds)  # warms up
        rounds = {name: [] for name in tools}
        for number in range(args.rounds):
            names = list(tools)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                watch = WatchBeside(pid)
                rounds[name].append(tools[name](number))
                others.append(watch.others())
            print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
    if args.paced:
        rounds["truth"] = [truth(load)] * args.rounds
    results = {
        "server": "paced" if args.paced else server.software,
        "load": {
            "requests": len(load.rows),
            "rate": load.rate,
            "prompt_tokens_mean": statistics.mean(row[1] for row in load.rows),
            "output_tokens_mean": statistics.mean(row[2] for row in load.rows),
            "slo": load.slo,
        },
        "others_share": others,
        "ours_over": {
            name: compare(rounds["ours"], found) for name, found in rounds.items() if name != "ours"
        },
        "rounds": rounds,
    }
    text = json.dumps(results, indent=1)
    if args.out:
        args.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
