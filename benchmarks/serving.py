"""What serving over HTTP costs beside the engine in process, on a 135M Llama with random weights.

Both get the same requests in short turns, a few seconds each, so that a machine whose speed drifts
meets both alike; each round begins with the other one. Throughput is told twice: by the times that
whole batches took, in which every stall of the machine counts, and by the median gap between the
tokens of full batches, in which none does. Of TTFT the difference is told, and of each request how
much later than at the engine its first token was at the client: a step takes many times as long,
and when within one a request comes is chance. Intervals of 95% are over resampled rounds. The
generator runs on the same machine and takes its share of it, as it does not in process; with
`--threads 1` a core is left for it and the server.

Then 500 streams at once on the embedded model, every token of which is compared with what the
engine makes of the same prompts in process; and the time from the start of `autotune serve` to its
first healthy answer.

    python -m benchmarks.serving --out benchmarks/results/<machine>/serving.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from autotune.embedded import TARGET
from autotune.load import LoadResult, run_load
from autotune.load.discover import discover
from autotune.load.endpoint import Endpoint
from autotune.load.http_load import run_http_load
from autotune.metrics import latencies
from autotune.workload.materialise import LoadRequest
from benchmarks.engine_speed import LLAMA_135M, save_random_llama
from benchmarks.server_process import WatchBeside, flags_of, resident_bytes, served, started
from benchmarks.timed_server import named, read_first_tokens
from engine.config import EngineConfig
from engine.engine import Engine
from engine.loading import load_model
from engine.tokenizer import load_tokenizer

BATCH = 32
PROMPT = 256
OUTPUT = 64
# Share of the throughput that the paced load asks for: below it TTFT is the server's, not a
# queue's.
SHARE = 0.6
RESAMPLES = 4000
STREAMS = 500
STREAM_OUTPUT = 48
STARTS = 5
DRAIN_S = 600.0
Rounds = Sequence[dict[str, Any]]


def requests(
    rng: np.random.Generator, count: int, *, vocabulary: int, rate: float | None = None
) -> list[LoadRequest]:
    """Prompts that share nothing, all at once or as a Poisson process."""
    arrivals = np.zeros(count) if rate is None else np.cumsum(rng.exponential(1 / rate, count))
    ids = rng.integers(3, vocabulary, size=(count, PROMPT))
    return [
        LoadRequest(str(i), float(at), tuple(prompt.tolist()), OUTPUT)
        for i, (at, prompt) in enumerate(zip(arrivals, ids, strict=True))
    ]


class InProcess:
    """The engine in this process."""

    def __init__(self, knobs: dict[str, Any]) -> None:
        self.config = EngineConfig.from_mapping(knobs)
        self.loaded = load_model(self.config)
        self.engine: Engine = self.loaded.engine(self.config)

    def load(self, wanted: Sequence[LoadRequest]) -> LoadResult:
        """Offer the requests."""
        return run_load(self.engine, wanted, drain_limit=DRAIN_S)


class OverHttp:
    """The server, as a client sees it; it writes its engine's times into a file."""

    def __init__(self, endpoint: Endpoint, times: Path) -> None:
        self.endpoint = endpoint
        self.times = times

    def load(self, wanted: Sequence[LoadRequest]) -> LoadResult:
        """Offer the requests."""
        return run_http_load(self.endpoint, wanted, drain_limit=DRAIN_S)

    def beside_engine(self, wanted: Sequence[LoadRequest], result: LoadResult) -> list[float]:
        """By how many seconds each request's first token came later than at the engine."""
        own = read_first_tokens(self.times)
        prompts = {request.request_id: request.token_ids for request in wanted}
        return [
            record.token_times[0] - record.send - own[named(prompts[record.request_id])]
            for record in result.records
        ]


def figures(result: LoadResult) -> dict[str, Any]:
    """How long it took, and the requests' latencies, in seconds."""
    unfinished = [record.reason for record in result.records if not record.completed]
    assert not unfinished, unfinished[0]
    assert all(r.output_tokens == r.asked_output_tokens for r in result.records)
    sends = [record.send - record.intended_send for record in result.records]
    found: dict[str, Any] = {
        "seconds": max(record.token_times[-1] for record in result.records),
        "output_tokens": sum(record.output_tokens for record in result.records),
        "send_lag_p99": float(np.percentile(sends, 99)),
    }
    found["gap"] = float(np.median(latencies("itl", result.records)[0]))
    for metric in ("ttft", "tpot"):
        found[metric] = [round(float(v), 6) for v in latencies(metric, result.records)[0]]
    return found


def _tokens_per_s(row: Mapping[str, Any]) -> float:
    return float(row["output_tokens"] / row["seconds"])


def overhead(
    contenders: dict[str, Any], server_pid: int, rounds: int, batches: int, paced_requests: int
) -> dict[str, Any]:
    """The same loads on each contender in turn, and what the last costs beside the first."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    beside: list[float] = []
    rate = None
    for number in range(rounds + 1):
        names = list(contenders) if number % 2 else list(contenders)[::-1]
        full = requests(np.random.default_rng(number), batches * BATCH, vocabulary=49152)
        if rate is not None:
            paced = requests(
                np.random.default_rng([number, 1]), paced_requests, vocabulary=49152, rate=rate
            )
        for name in names:
            watch = WatchBeside(server_pid)
            results = {"full": figures(contenders[name].load(full))}
            if rate is not None:
                result = contenders[name].load(paced)
                results["paced"] = figures(result)
                if isinstance(contenders[name], OverHttp):
                    beside += contenders[name].beside_engine(paced, result)
                found[name].append({**results, "others_share": watch.others()})
        if rate is None:  # the first round warms up, and tells what the machine can do
            rate = SHARE * _tokens_per_s(results["full"]) / OUTPUT
        else:
            say(number, {name: rows[-1] for name, rows in found.items()})
    first, last = (found[name] for name in contenders)
    return {
        "rate": rate,
        "first_token_beside_engine_s": {
            "requests": len(beside),
            **{f"p{q}": float(np.percentile(beside, q)) for q in (50, 90, 95, 99)},
        },
        "throughput_lost": resampled(first, last, partial(_lost, "gap")),
        "throughput_lost_with_stalls": resampled(first, last, partial(_lost, "seconds")),
        "ttft_p95_later_s": resampled(first, last, partial(_later, "ttft", 95.0)),
        "ttft_median_later_s": resampled(first, last, partial(_later, "ttft", 50.0)),
        "tpot_median_later_s": resampled(first, last, partial(_later, "tpot", 50.0)),
        "rounds": found,
    }


def _lost(time: str, first: Rounds, last: Rounds) -> float:
    """Share of the throughput over all batches, each of the same number of tokens."""
    return 1 - sum(r["full"][time] for r in first) / sum(r["full"][time] for r in last)


def _later(metric: str, percentile: float, first: Rounds, last: Rounds) -> float:
    """Seconds by which a percentile over all paced requests is later."""
    a, b = ([v for r in rounds for v in r["paced"][metric]] for rounds in (first, last))
    return float(np.percentile(b, percentile) - np.percentile(a, percentile))


def resampled(
    first: Rounds, last: Rounds, figure: Callable[[Rounds, Rounds], float]
) -> dict[str, Any]:
    """A figure of two contenders' rounds, with a 95% percentile interval over resampled rounds."""
    rng = np.random.default_rng(0)
    values = []
    for _ in range(RESAMPLES):
        chosen = rng.integers(0, len(first), len(first))
        values.append(figure([first[i] for i in chosen], [last[i] for i in chosen]))
    low, high = np.percentile(values, [2.5, 97.5])
    return {"value": figure(first, last), "interval": [float(low), float(high)]}


def many_streams(knobs: dict[str, Any]) -> dict[str, Any]:
    """500 answers at once, each token compared with that of the engine in process."""
    vocabulary = load_tokenizer(TARGET).vocab_size
    rng = np.random.default_rng(7)
    wanted = [
        LoadRequest(str(i), 0.0, tuple(rng.integers(3, vocabulary, length).tolist()), STREAM_OUTPUT)
        for i, length in enumerate(rng.integers(8, 96, STREAMS))
    ]
    expected = InProcess(knobs).load(wanted)
    with served(knobs) as server:
        endpoint = discover(server.url).endpoint
        before = resident_bytes(server.pid)
        result = run_http_load(endpoint, wanted, drain_limit=DRAIN_S)
        grown = resident_bytes(server.pid) - before
    pairs = list(zip(result.records, expected.records, strict=True))
    return {
        "streams": len(pairs),
        "finished": sum(got.completed for got, _ in pairs),
        "tokens": sum(got.output_tokens for got, _ in pairs),
        "lost_tokens": sum(want.output_tokens - got.output_tokens for got, want in pairs),
        "answers_that_differ": sum(
            got.output_token_ids != want.output_token_ids for got, want in pairs
        ),
        "seconds": result.duration,
        "seconds_in_process": expected.duration,
        "server_grew_bytes": grown,
    }


def start_times() -> dict[str, Any]:
    """Seconds from the start of the process to its first healthy answer, on the embedded model."""
    seconds = []
    for _ in range(STARTS):
        with served({"device": "cpu"}) as server:
            seconds.append(server.healthy_s)
    return {"median_s": statistics.median(seconds), "all_s": seconds}


def say(number: int, rows: dict[str, dict[str, Any]]) -> None:
    """Tell a round to a person."""
    parts = [
        f"{name}: {_tokens_per_s(row['full']):.1f} tokens/s, "
        f"TTFT median {statistics.median(row['paced']['ttft']) * 1e3:.1f} ms"
        for name, row in rows.items()
    ]
    print(f"round {number}: {'; '.join(parts)}", file=sys.stderr)


def main() -> None:
    """Run everything and print the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--batches", type=int, default=1, help="of the load without a pause")
    parser.add_argument("--paced-requests", type=int, default=24, help="of the load in time")
    parser.add_argument("--threads", type=int, help="num_threads of both engines")
    parser.add_argument("--only", choices=("overhead", "streams", "start"))
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    common = {"device": "cpu", "enable_prefix_caching": False, "num_threads": args.threads}
    results: dict[str, Any] = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "load_average": os.getloadavg()[0],
        },
        "shape": LLAMA_135M,
        "load": {
            "batch": BATCH,
            "prompt_tokens": PROMPT,
            "output_tokens": OUTPUT,
            "threads": args.threads or os.cpu_count(),
            "full_requests": args.batches * BATCH,
            "paced_requests": args.paced_requests,
            "paced_share": SHARE,
        },
    }
    if args.only in (None, "overhead"):
        with tempfile.TemporaryDirectory() as folder:
            save_random_llama(Path(folder), LLAMA_135M, torch.bfloat16)
            knobs = {
                **common,
                "model": folder,
                "max_model_len": 512,
                "max_num_seqs": BATCH,
                "kv_cache_memory_bytes": 640 << 20,
            }
            times = Path(folder) / "first_tokens.jsonl"
            timed = ["-m", "benchmarks.timed_server", str(times), "serve", *flags_of(knobs)]
            with started(timed) as server:
                endpoint = Endpoint(server.url, Path(folder).name)
                over_http = OverHttp(endpoint, times)
                contenders = {"in_process": InProcess(knobs), "over_http": over_http}
                results["overhead"] = overhead(
                    contenders, server.pid, args.rounds, args.batches, args.paced_requests
                )
    if args.only in (None, "streams"):
        many = {**common, "model": str(TARGET), "max_num_seqs": 256}
        results["many_streams"] = many_streams(many)
    if args.only in (None, "start"):
        results["start"] = start_times()
    text = json.dumps(results, indent=1)
    if args.out:
        args.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
