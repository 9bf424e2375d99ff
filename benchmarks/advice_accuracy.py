"""Advice before and after: each testable piece is predicted, then measured beside the default.

For every model and situation the default is profiled and advised on; then the default and every
advised configuration are measured in turns, so that what else the machine does falls on all of
them. A measured gain is the median over rounds of the ratio to the default measured next to it.

    python -m benchmarks.advice_accuracy --out benchmarks/results/<machine>/advice_accuracy.json
        [--models embedded,135m] [--situations "long prompts,few seats"] [--rounds 3]
        [--window 8] [--changes all] [--threads N]
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from autotune.advise.advise import advise
from autotune.diagnose.diagnose import diagnose
from autotune.hardware.detect import describe_hardware
from autotune.loaded_engines import LoadedEngines
from autotune.measure import Measurement
from autotune.model_info import with_default_model
from autotune.predict.change import Change
from autotune.predict.gain import PredictedGain, same_direction
from autotune.predict.predictor import Predictor, predictor_for
from autotune.profiling.build import build_profile
from autotune.profiling.evidence import LoadEvidence, prompts_of
from autotune.profiling.machine import MachineCalibration, calibrate_machine
from autotune.profiling.model_facts import model_facts
from autotune.profiling.schema import Source
from autotune.records import utc_now
from autotune.search.methods_offered import offer_for
from autotune.slo import Slo, parse_slo, statistic_of
from autotune.workload.materialise import LoadRequest
from benchmarks.advice_engines import model_folder, offered
from benchmarks.advice_situations import SITUATIONS, Situation
from engine.config import EngineConfig
from engine.errors import EngineError

# Requests that the sustained rate is found with.
BURST = 48
# The caches of several engines lie in memory at once.
CACHE_BYTES = 256 << 20
# Configurations measured between two of the default.
BETWEEN = 2
# Single changes that are measured with `--changes all`, whether they are advised or not.
CHANGES: tuple[dict[str, Any], ...] = (
    {"quantization": "int8"},
    {"quantization": "int4"},
    {"kv_cache_dtype": "int8"},
    {"block_size": 32},
    {"max_num_seqs": 8},
    {"max_num_seqs": 64},
    {"max_num_batched_tokens": 256},
    {"enable_prefix_caching": True},
    {"scheduling_policy": "sjf"},
    {"batching_mode": "continuous"},
)


def value_of(measured: Measurement, gain: PredictedGain) -> float | None:
    """What a gain is a ratio of: greater is better for throughput and cost alone."""
    if gain.metric in ("throughput", "cost"):
        return float(measured.metrics["output_tokens_per_s"])
    finished = [r for r in measured.records if r.completed]
    values = [v for r in finished if (v := getattr(r, gain.metric)) is not None]
    return statistic_of(values, gain.statistic or "p95")


def measured_gain(
    pairs: Sequence[tuple[Measurement, Measurement]], gain: PredictedGain
) -> dict[str, Any] | None:
    """Over rounds of (default, changed): the median of the ratio, and each ratio.

    The median, as a round in which the machine was at something else says nothing of the change.
    """
    logs = []
    for default, changed in pairs:
        before, after = value_of(default, gain), value_of(changed, gain)
        if not before or not after:
            return None
        sign = 1 if gain.metric in ("throughput", "cost") else -1
        logs.append(sign * (math.log(after) - math.log(before)))
    return {
        "value": math.exp(statistics.median(logs)),
        "rounds": [math.exp(log) for log in logs],
        "spread": statistics.stdev(logs) if len(logs) > 1 else None,
    }


def scored(gain: PredictedGain, measured: Mapping[str, Any]) -> dict[str, Any]:
    """A prediction beside its measurement."""
    value = measured["value"]
    return {
        **gain.to_json(),
        "measured": measured,
        "error": abs(gain.value / value - 1),
        "held": gain.low <= value <= gain.high,
        "direction_right": same_direction(gain.value, value),
    }


def in_turns(
    configs: Sequence[EngineConfig],
    default: EngineConfig,
    engines: LoadedEngines,
    requests: Sequence[LoadRequest],
    slo: Slo,
    rounds: int,
) -> list[list[tuple[Measurement, Measurement]]]:
    """For each config its pairs with the default measured just before or after, one a round."""
    pairs: list[list[tuple[Measurement, Measurement]]] = [[] for _ in configs]
    for round_ in range(rounds):
        order = list(range(len(configs)))
        order = order[round_ % max(1, len(order)) :] + order[: round_ % max(1, len(order))]
        for at in range(0, len(order), BETWEEN):
            reference = offered(engines.engine(default), default, requests, slo)
            for index in order[at : at + BETWEEN]:
                config = configs[index]
                pairs[index].append(
                    (reference, offered(engines.engine(config), config, requests, slo))
                )
    return pairs


def configured(situation: Situation, base: EngineConfig) -> EngineConfig:
    """The default of a situation on a model."""
    knobs = dict(situation.knobs)
    if situation.cache_sequences is not None:
        facts = model_facts(base)
        tokens = max(situation.cache_sequences * situation.mean_tokens, 640)
        # The engine wants room for its longest sequence.
        knobs["max_model_len"] = 640
        knobs["kv_cache_memory_bytes"] = int(tokens * facts.kv_bytes_per_token)
    return base.replace(**knobs)


def judge(
    situation: Situation,
    base: EngineConfig,
    engines: LoadedEngines,
    machine: MachineCalibration,
    options: argparse.Namespace,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Profile, advise, predict and measure one situation."""
    default, slo = configured(situation, base), parse_slo(situation.slo)
    engine = engines.engine(default)
    vocabulary = model_facts(default).vocab_size
    burst = situation.requests(BURST, None, vocabulary, seed=1)
    calibration = offered(engine, default, burst, slo)
    sustained = calibration.metrics["requests_per_s"]
    rate = None if situation.load is None else situation.load * sustained
    count = max(options.requests, math.ceil((rate or sustained) * options.window))
    requests = situation.requests(count, rate, vocabulary, seed=2)
    measured = offered(engine, default, requests, slo)
    evidence = LoadEvidence(measured.records, measured.steps, prompts_of(requests), True)
    profile = build_profile(
        evidence,
        default,
        source=Source(kind="run"),
        metrics=measured.metrics,
        model=model_facts(default),
        hardware=describe_hardware(default.device),
        slo=situation.slo,
        machine=machine,
        created_at=utc_now(),
    )
    began = time.perf_counter()
    predictor = predictor_for(profile, evidence, slo, seed=0, budget_s=options.prediction_budget)
    advised = advise(profile, diagnose(profile), predictor, slo=slo)
    predicting = time.perf_counter() - began
    changes = [
        (item.technique, dict(item.knobs), item.gain, item.gains)
        for item in advised.advice
        if item.testable and item.knobs
    ]
    if options.changes == "all":
        changes += list(_others(default, [knobs for _, knobs, _, _ in changes], predictor))
    say(f"{situation.name}: {len(requests)} requests, {len(changes)} configurations")
    kept, configs = [], []
    for change in changes:
        try:
            config = default.replace(**change[1])
            engines.engine(config)
        except EngineError as error:
            say(f"  {change[1]} is refused: {error}")
            continue
        kept.append(change)
        configs.append(config)
    pairs = in_turns(configs, default, engines, requests, slo, options.rounds)
    base_metrics = predictor.metrics()
    entries = []
    for (technique, knobs, gain, gains), measurements in zip(kept, pairs, strict=True):
        told = [g for g in gains if _is_measured(g, situation)]
        results = [
            scored(g, found) for g in told if (found := measured_gain(measurements, g)) is not None
        ]
        headline = gain if gain is not None and _is_measured(gain, situation) else None
        entries.append(
            {
                "technique": technique,
                "advised": technique != "change",
                "knobs": knobs,
                "gains": results,
                "headline": next(
                    (r for r in results if headline and r["metric"] == headline.metric), None
                ),
            }
        )
        for r in results:
            say(
                f"  {technique} {knobs} {r['metric']}: {r['value']:.2f} "
                f"[{r['low']:.2f}, {r['high']:.2f}], measured {r['measured']['value']:.2f} "
                f"{[round(x, 2) for x in r['measured']['rounds']]}"
            )
    return {
        "situation": situation.name,
        "rate": rate,
        "requests": len(requests),
        "basis": predictor.basis,
        "prediction_s": predicting,
        "step_fit": None if profile.step_fit is None else profile.step_fit.model_dump(),
        "replay_over_measured": _replay_error(base_metrics, measured.metrics),
        "entries": entries,
    }


def _others(
    default: EngineConfig, taken: Sequence[Mapping[str, Any]], predictor: Predictor
) -> Iterator[tuple[str, dict[str, Any], PredictedGain | None, tuple[PredictedGain, ...]]]:
    """Changes that were not advised, with what they are predicted to come to."""
    for knobs in CHANGES:
        if knobs in taken or all(getattr(default, n) == v for n, v in knobs.items()):
            continue
        gains = predictor.gains(Change(knobs))
        if gains:
            yield "change", knobs, None, gains


def _is_measured(gain: PredictedGain, situation: Situation) -> bool:
    """Whether this traffic measures it: throughput only where nothing waits to arrive."""
    if gain.metric in ("throughput", "cost"):
        return situation.load is None and gain.metric == "throughput"
    return gain.metric in ("ttft", "tpot", "e2e")


def _replay_error(
    replayed: Mapping[str, Any] | None, measured: Mapping[str, Any]
) -> dict[str, float] | None:
    if replayed is None:
        return None
    return {
        f"{statistic}({metric})": replayed[metric][statistic] / measured[metric][statistic]
        for metric in ("ttft", "tpot", "e2e")
        for statistic in ("mean", "p95")
        if replayed[metric][statistic] and measured[metric][statistic]
    }


def summary(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How well predictions fared: of each advice's own metric, and of all metrics."""
    entries = [e for r in results for s in r["situations"] for e in s["entries"]]
    sets = {
        "advice": [e["headline"] for e in entries if e["advised"] and e["headline"]],
        "advice, all metrics": [g for e in entries if e["advised"] for g in e["gains"]],
        "all changes, all metrics": [g for e in entries for g in e["gains"]],
    }
    return {name: _fared(gains) for name, gains in sets.items()}


def _fared(gains: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if not gains:
        return {"scored": 0}
    errors = sorted(g["error"] for g in gains)
    return {
        "scored": len(gains),
        "median_error": statistics.median(errors),
        "p90_error": errors[min(len(errors) - 1, int(0.9 * len(errors)))],
        "direction_right": sum(g["direction_right"] for g in gains) / len(gains),
        "held": sum(g["held"] for g in gains) / len(gains),
    }


def main() -> None:
    """Run and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="embedded,135m")
    parser.add_argument("--situations", default=",".join(s.name for s in SITUATIONS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--window", type=float, default=8.0, help="seconds of load")
    parser.add_argument("--requests", type=int, default=40, help="at least so many")
    parser.add_argument("--changes", choices=("advised", "all"), default="advised")
    parser.add_argument("--prediction-budget", type=float, default=20.0)
    parser.add_argument("--calibration-budget", type=float, default=8.0)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    wanted = options.situations.split(",")
    began = time.perf_counter()
    results = []
    for name in options.models.split(","):
        with model_folder(name) as folder:
            base = with_default_model(
                EngineConfig(
                    model=folder,
                    device="cpu",
                    num_threads=options.threads,
                    kv_cache_memory_bytes=CACHE_BYTES,
                )
            )
            engines = LoadedEngines(keep=True)
            offer = offer_for(describe_hardware("cpu"), quantized=False).values
            machine = calibrate_machine(
                engines.loaded(base),
                base,
                model_facts(base),
                offer["quantization"],
                offer["kv_cache_dtype"],
                budget_s=options.calibration_budget,
            )
            print(f"{name}: probes took {machine.probes.seconds:.1f} s", flush=True)
            situations = []
            for situation in SITUATIONS:
                if situation.name in wanted:
                    situations.append(
                        judge(
                            situation,
                            base,
                            engines,
                            machine,
                            options,
                            lambda t: print(t, flush=True),
                        )
                    )
            engines.close()
        results.append(
            {"model": name, "probes_s": machine.probes.seconds, "situations": situations}
        )
    report = {
        "machine": platform.processor() or platform.machine(),
        "at": utc_now(),
        "seconds": time.perf_counter() - began,
        "options": {k: str(v) for k, v in vars(options).items() if k != "out"},
        "summary": summary(results),
        "models": results,
    }
    print(json.dumps(report["summary"], indent=2))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
