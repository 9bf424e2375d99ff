"""Run folders for tests, written by `RunFolder`'s own writers from a small queueing model.

The numbers are invented but consistent: metrics are computed from the request records, so that a
report can be checked against them.
"""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from typing import Any

import numpy as np

from autotune.records import LimitResult, RequestRecord, RunFolder, TrialRecord
from engine.step_record import StepRecord

DEFAULT = {
    "model": "models/tiny",
    "device": "cpu",
    "seed": 0,
    "quantization": "none",
    "block_size": 16,
    "kv_cache_memory_bytes": None,
    "enable_prefix_caching": True,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 2048,
    "scheduling_policy": "fcfs",
}
WINNER = {**DEFAULT, "quantization": "int8", "max_num_seqs": 64, "block_size": 32}
SPACE = {
    "quantization": ["none", "int8", "int4"],
    "block_size": [8, 16, 32, 64],
    "max_num_seqs": [8, 16, 32, 64, 128, 256],
    "max_num_batched_tokens": [256, 512, 1024, 2048, 4096],
    "scheduling_policy": ["fcfs", "sjf"],
    "enable_prefix_caching": [True, False],
}
SLO = (("ttft<200ms", "ttft", 0.2), ("tpot<100ms", "tpot", 0.1))
# Relative perplexity, mean KL and bits of a weight, by quantization.
HARM = {
    "none": (0.0, 0.0, 16),
    "int8": (0.0003, 0.001, 8),
    "smoothquant": (0.0008, 0.0008, 8),
    "int4": (0.0137, 0.024, 4),
    "gptq": (0.0072, 0.014, 4),
    "awq": (0.0081, 0.015, 4),
}


def speed_of(config: dict[str, Any]) -> float:
    """How many times faster than the default a configuration serves."""
    by_bits = {16: 1.0, 8: 1.45, 4: 1.1}
    speed = by_bits[HARM[config["quantization"]][2]]
    speed *= 1 - 0.05 * abs(math.log2(config["max_num_seqs"] / 64))
    return speed * (1.04 if config["block_size"] == 32 else 1.0)


def requests_of(
    speed: float, count: int, seed: int, rate: float = 6.0, misses: int = 0
) -> list[RequestRecord]:
    """Requests through one server whose queue grows when the speed does not suffice."""
    random_ = random.Random(seed)
    records, now, free = [], 0.0, 0.0
    for index in range(count):
        now += random_.expovariate(rate)
        prompt = int(min(random_.lognormvariate(5.2, 0.8), 4000)) + 1
        output = int(min(random_.lognormvariate(3.4, 0.6), 400)) + 1
        begin = max(now, free)
        free = begin + (prompt * 0.0001 + output * 0.0015) / speed
        gap = 0.021 / speed
        times, at = [], begin + 0.02 + prompt * 0.00025 / speed
        for _ in range(output):
            times.append(at)
            at += gap * random_.lognormvariate(0.0, 0.35)
        lost = index < misses
        records.append(
            RequestRecord(
                request_id=f"r{index}",
                intended_send=now,
                send=now + 0.0004,
                token_times=() if lost else tuple(times),
                input_tokens=prompt,
                output_tokens=0 if lost else output,
                asked_output_tokens=output,
                outcome="timed_out" if lost else "finished",
                reason="no first token within 30 s" if lost else None,
            )
        )
    return records


def steps_of(requests: list[RequestRecord], seed: int) -> list[StepRecord]:
    """Steps every 30 ms with the queue and batch that the requests imply; a clock of its own."""
    random_ = random.Random(seed)
    end = max((r.token_times[-1] for r in requests if r.token_times), default=1.0)
    steps, at = [], 0.0
    while at < end:
        alive = [r for r in requests if r.token_times and r.intended_send <= at]
        waiting = sum(at < r.token_times[0] for r in alive)
        running = sum(r.token_times[0] <= at < r.token_times[-1] for r in alive)
        steps.append(
            StepRecord(
                start=1000.0 + at,
                prefill_tokens=40,
                prefill_sequences=1,
                decode_sequences=running,
                kv_tokens_read=running * 300,
                device_seconds=0.025,
                host_seconds=0.002,
                scheduler_seconds=0.001,
                queue_length=waiting,
                running=running,
                blocks_used=min(running * 18, 512),
                blocks_cached=4,
                blocks_total=512,
                preemptions=0,
                prefix_hit_tokens=0,
                drafted_tokens=0,
                accepted_tokens=0,
            )
        )
        at += 0.03 * random_.uniform(0.8, 1.2)
    return steps


def bench_of(requests: list[RequestRecord], config: dict[str, Any]) -> dict[str, Any]:
    """The metrics of `bench`, from the records."""
    done = [r for r in requests if r.completed]
    end = max((r.token_times[-1] for r in done), default=1.0)
    good = sum((r.ttft or 0) < 0.2 and (r.tpot or 0) < 0.1 for r in done)
    gaps = [b - a for r in done for a, b in zip(r.token_times, r.token_times[1:], strict=False)]
    return {
        "ttft": _statistics([r.ttft for r in done]),
        "tpot": _statistics([r.tpot for r in done]),
        "itl": _statistics(gaps),
        "e2e": _statistics([r.e2e for r in done]),
        "output_tokens_per_s": sum(r.output_tokens for r in done) / end,
        "requests_per_s": len(done) / end,
        "goodput_requests_per_s": good / end,
        "slo_attainment": good / len(requests) if requests else 0.0,
        "completed": len(done),
        "failed": 0,
        "refused": 0,
        "timed_out": len(requests) - len(done),
        "duration_s": end,
        "offered_rate": 6.0,
        "error_rate": 1 - len(done) / len(requests) if requests else 0.0,
        "load_delivered": True,
        "load_note": None,
        "config": config,
        "engine": {
            "steps": 900,
            "preemptions": 3,
            "prefix_hit_rate": 0.12,
            "kv_blocks_total": 512,
            "kv_peak_usage": 0.61,
            "mean_batch": 11.3,
            "host_share": 0.07,
            "device_share": 0.93,
        },
    }


def quality_of(config: dict[str, Any]) -> dict[str, Any]:
    """The harm of a quantization as the search records it; the reference has none at all."""
    method = config["quantization"]
    loss, kl, bits = HARM[method]
    spread = 0.3 * kl**0.5 / 7
    return {
        "variant": method,
        "quantization": method,
        "kv_cache_dtype": "auto",
        "weight_bytes": 1_000_000 * bits,
        "kv_bytes_per_token": 3072,
        "perplexity": 18.9 * (1 + loss),
        "reference_perplexity": 18.9,
        "quality_loss": loss,
        "quality_loss_low": loss - spread,
        "quality_loss_high": loss + spread,
        "kl": kl,
        "kl_low": 0.95 * kl,
        "kl_high": 1.05 * kl,
        "kl_p99": 6 * kl,
        "kl_p99_low": 5 * kl,
        "kl_p99_high": 7 * kl,
        "top1_agreement": 1 - 4 * kl,
        "top1_agreement_low": 1 - 4.2 * kl,
        "top1_agreement_high": 1 - 3.8 * kl,
        "windows": 32,
        "positions": 4096,
    }


def guard_of(config: dict[str, Any], limit: str, bound: float) -> LimitResult:
    """A limit on the quality as the search evaluates it."""
    measured = quality_of(config)[limit.split("<")[0]]
    return LimitResult(limit, measured, bound, measured < bound, measured / bound - 1)


def predicted_of(bench: dict[str, Any], off: float) -> dict[str, Any]:
    """A prediction that is too high by a share, with bounds of a tenth on either side."""

    def interval(value: float) -> dict[str, float]:
        middle = value * (1 + off)
        return {"value": middle, "low": middle * 0.9, "high": middle * 1.1}

    metrics = {
        f"{metric}.{statistic}": interval(bench[metric][statistic])
        for metric in ("ttft", "tpot", "e2e")
        for statistic in ("mean", "p95")
    }
    metrics["output_tokens_per_s"] = interval(bench["output_tokens_per_s"])
    metrics["limit ttft<200ms"] = interval(0.1)
    return {
        "metrics": metrics,
        "objective": interval(bench["goodput_requests_per_s"]),
        "p_meets_slo": 0.75,
        "after_trials": 3,
    }


def limits_of(bench: dict[str, Any]) -> list[LimitResult]:
    """The two limits of `SLO` on their p95, to which unfinished requests are infinitely late."""
    out = []
    for name, metric, bound in SLO:
        measured = bench[metric]["p95"] if bench["error_rate"] < 0.05 else None
        violation = 1000.0 if measured is None else measured / bound - 1
        out.append(LimitResult(name, measured, bound, violation <= 0, violation))
    return out


def run_json(**changes: Any) -> dict[str, Any]:
    """A `run.json` without a result."""
    run = {
        "schema_version": 1,
        "command": ["autotune", "run", "--slo", "ttft<200ms,tpot<100ms", "--budget", "4m"],
        "started_at": "2026-03-04T10:20:30+00:00",
        "finished_at": None,
        "status": "running",
        "model": {
            "path": "models/tiny",
            "name": "tiny-llama-10m",
            "architecture": "LlamaForCausalLM",
            "parameters": 10_234_880,
            "fingerprint": "9f2c" * 16,
        },
        "engine_config": DEFAULT,
        "workload": {
            "source": "azure_llm_2023_conv.csv",
            "format": "azure",
            "requests": 240,
            "duration_s": 40.0,
            "rate": 6.0,
            "scaling": {
                "rate": 0.31,
                "lengths": 0.25,
                "slice": "0:240",
                "notes": ["Lengths were scaled by 0.25, the rate to 6 requests/s."],
            },
            "input_tokens": {"mean": 247.1, "p50": 181.0, "p95": 668.0, "max": 1466.0},
            "output_tokens": {"mean": 36.2, "p50": 30.0, "p95": 81.0, "max": 170.0},
            "prefix_share": 0.12,
            "fingerprint": "ab12" * 16,
        },
        "slo": "ttft<200ms,tpot<100ms",
        "objective": "goodput",
        "objective_unit": "requests/s",
        "direction": "maximize",
        "budget_s": 240.0,
        "max_trials": None,
        "search_space": SPACE,
        "hardware": {"device": "cpu", "name": "Xeon Platinum 8481C", "memory_bytes": 2**34},
        "versions": {"autotune": "0.1.0", "python": "3.11.7", "torch": "2.13.0"},
        "seeds": {"seed": 0},
        "result": None,
    }
    return {**run, **changes}


def write_run(
    path: Path,
    *,
    trials: int = 28,
    rounds: int = 4,
    requests: int = 240,
    seed: int = 0,
    finished: bool = True,
    winner: dict[str, Any] | None = WINNER,
    **changes: Any,
) -> RunFolder:
    """A run of `trials` search trials and, if finished, a proof of the default and the winner.

    `winner=None` makes the default win. `changes` replace entries of `run.json`.
    """
    path.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(path)
    for number, config in enumerate(_configs(trials, seed)):
        add_trial(folder, number, config, requests, seed=seed + number, whole=number == 0)
    run = run_json(**changes)
    if finished:
        result = _prove(folder, trials, rounds, requests, seed, winner)
        run = {**run, "status": "done", "finished_at": "2026-03-04T10:24:31+00:00"}
        run["result"] = {**result, **(changes.get("result") or {})}
    folder.write_json(folder.run_json, run)
    folder.merge_parts()
    return folder


def add_trial(
    folder: RunFolder,
    number: int,
    config: dict[str, Any],
    requests: int,
    *,
    seed: int = 0,
    kind: str = "search",
    round_: int = 0,
    whole: bool = True,
    misses: int = 0,
    guard: tuple[str, float] | None = None,
    off: float | None = None,
) -> TrialRecord:
    """Measure a configuration in the model; `whole` also writes the requests and steps.

    Every eighth search trial runs out of memory instead. A config that breaks `guard`, a limit on
    the quality with its bound, is offered no load. `off` predicts it, too high by that share.
    """
    failed = kind == "search" and number % 8 == 5
    common = {
        "number": number,
        "kind": kind,
        "source": "default" if config == DEFAULT else ("seed" if number < 4 else "tpe"),
        "config": config,
        "seconds": 7.5,
        "started_at": "2026-03-04T10:20:30+00:00",
        "rate": 6.0,
        "seed": seed,
        "round": round_,
    }
    if failed:
        reason = "the KV cache of 4,096 MiB does not fit in 2,210 MiB of free memory"
        trial = TrialRecord(**common, outcome="out_of_memory", reason=reason)
        folder.append_trial(trial)
        return trial
    if guard and not guard_of(config, *guard).met:
        trial = TrialRecord(
            **common,
            outcome="quality",
            reason=f"breaks {guard[0]}",
            slo=[guard_of(config, *guard)],
            quality=quality_of(config),
        )
        folder.append_trial(trial)
        return trial
    records = requests_of(speed_of(config), requests, seed, misses=misses)
    quality = quality_of(config)
    bench = {**bench_of(records, config), "quality": quality}
    limits = limits_of(bench) + ([guard_of(config, *guard)] if guard else [])
    trial = TrialRecord(
        **common,
        outcome="ok",
        metrics=bench,
        slo=limits,
        slo_met=all(item.met for item in limits),
        objective=bench["goodput_requests_per_s"],
        quality=quality,
        predicted=None if off is None else predicted_of(bench, off),
    )
    folder.append_trial(trial)
    if whole:
        folder.write_part(number, records, steps_of(records, seed))
    return trial


def _prove(
    folder: RunFolder,
    first: int,
    rounds: int,
    requests: int,
    seed: int,
    winner: dict[str, Any] | None,
) -> dict[str, Any]:
    """Interleaved rounds; the result as the search writes it."""
    numbers: dict[str, list[int]] = {"baseline": [], "winner": []}
    number = first
    for round_ in range(rounds):
        for side, config in (("baseline", DEFAULT), ("winner", winner)):
            if config is not None:
                add_trial(
                    folder,
                    number,
                    config,
                    requests,
                    seed=seed + round_,
                    kind="proof",
                    round_=round_,
                )
                numbers[side].append(number)
                number += 1
    numbers["winner"] = numbers["winner"] or numbers["baseline"]
    config = winner or DEFAULT
    pooled = {
        side: bench_of(
            [r for n in numbers[side] for r in folder.read_requests(n)],
            DEFAULT if side == "baseline" else config,
        )
        for side in numbers
    }
    measured = {trial.number: trial.metrics for trial in folder.read_trials()}
    for side, bench in pooled.items():
        # Rounds follow each other: the pooled rate is that of a round, not the sum of all.
        for key in ("output_tokens_per_s", "requests_per_s", "goodput_requests_per_s"):
            bench[key] = float(np.mean([measured[n][key] for n in numbers[side]]))
    ratio = pooled["winner"]["goodput_requests_per_s"] / max(
        pooled["baseline"]["goodput_requests_per_s"], 1e-9
    )
    gain = {
        "value": ratio,
        "low": ratio * 0.93,
        "high": ratio * 1.07,
        "confidence": 0.95,
        "unit": "ratio",
    }
    changes = {k: [DEFAULT[k], config[k]] for k in DEFAULT if DEFAULT[k] != config[k]}
    slo, baseline_slo = limits_of(pooled["winner"]), limits_of(pooled["baseline"])
    met = all(item.met for item in slo)
    runner_up = {**gain, "value": 1.04, "low": 0.97, "high": 1.12}
    return {
        "slo_met": met,
        "proven": met and bool(changes),
        "verdict": "int8 weights with a smaller batch serve more requests within the SLO.",
        "baseline": pooled["baseline"],
        "winner": pooled["winner"],
        "baseline_trials": numbers["baseline"],
        "winner_trials": numbers["winner"],
        "winner_config": config,
        "changes": changes,
        "gain": gain,
        "finalists": [
            {"config": config, "changes": changes, "trials": [], "gain": gain, "slo_met": met},
            {
                "config": DEFAULT,
                "changes": {"scheduling_policy": ["fcfs", "sjf"]},
                "trials": [],
                "gain": runner_up,
                "slo_met": False,
            },
        ],
        "importances": {
            "quantization": 0.61,
            "max_num_seqs": 0.22,
            "block_size": 0.09,
            "max_num_batched_tokens": 0.05,
            "enable_prefix_caching": 0.02,
            "scheduling_policy": 0.01,
        },
        "slo": [dataclasses.asdict(item) for item in slo],
        "baseline_slo": [dataclasses.asdict(item) for item in baseline_slo],
        "notes": [],
    }


def _configs(count: int, seed: int) -> list[dict[str, Any]]:
    random_ = random.Random(seed)
    drawn = [
        {**DEFAULT, **{knob: random_.choice(values) for knob, values in SPACE.items()}}
        for _ in range(max(count - 1, 0))
    ]
    return [DEFAULT, *drawn][:count]


def _statistics(values: list[float | None]) -> dict[str, Any]:
    kept = [v for v in values if v is not None]
    names = {"p50": 50, "p90": 90, "p95": 95, "p99": 99}
    if not kept:
        return {"mean": None, **dict.fromkeys(names), "intervals": {}}
    at = {name: float(np.percentile(kept, q)) for name, q in names.items()}
    intervals = {name: [v * 0.96, v * 1.05] for name, v in at.items()}
    return {"mean": float(np.mean(kept)), **at, "intervals": intervals}
