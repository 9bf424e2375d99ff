"""What tuning another engine brought: a finished run of `autotune run --engine`, in one JSON file.

For vLLM's CPU build, with a model folder M and the hour of a chat service as the trace:

    VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1 autotune run --engine vllm \\
        --engine-path VENV/bin/vllm --model M \\
        --workload azure_llm_2023_conv.csv --scale-lengths 0.25 --rate 4 --start 60s \\
        --duration 40s --slo "ttft<1s,tpot<100ms" --trials 8 --rounds 5 -o RUN
    python -m benchmarks.engine_tuned RUN --out vllm_tuned.json
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autotune.errors import BadInput
from autotune.records import RunFolder

_METRICS = (
    "output_tokens_per_s",
    "requests_per_s",
    "goodput_requests_per_s",
    "slo_attainment",
    "completed",
    "failed",
    "timed_out",
    "duration_s",
    "offered_rate",
    "load_delivered",
)


def summary(path: Path) -> dict[str, Any]:
    """What was tuned, on what, and what came of it; times in seconds.

    Raises:
        BadInput: no finished run of another engine.
    """
    folder = RunFolder(path)
    run = folder.read_run()
    if "engine" not in run or run["status"] != "done" or run["result"] is None:
        raise BadInput(f"{path} holds no finished run of another engine")
    trials, result = folder.read_trials(), run["result"]
    searched = [t for t in trials if t.kind == "search"]
    starts = [
        t.metrics["server"]["started_in_s"] for t in trials if t.metrics and "server" in t.metrics
    ]
    model = {k: run["model"][k] for k in ("name", "architecture", "parameters")}
    return {
        "engine": {k: run["engine"][k] for k in ("name", "title", "version", "device", "fixed")},
        "model": model,
        "hardware": run["hardware"],
        "versions": run["versions"],
        "measured_at": run["finished_at"],
        "workload": {**run["workload"], "source": Path(run["workload"]["source"]).name},
        "slo": run["slo"],
        "objective": run["objective"],
        "objective_unit": run["objective_unit"],
        "searched": {name: len(values) for name, values in run["search_space"].items()},
        "trials": dict(Counter(t.outcome for t in searched)),
        # Single measurements: what a change alone brings is seen, and not proven.
        "search": [
            {"config": _changes(run, t.config), "outcome": t.outcome, "objective": t.objective}
            for t in searched
        ],
        "proof_rounds": 1 + max((t.round for t in trials if t.kind == "proof"), default=-1),
        "seconds": sum(t.seconds for t in trials),
        "start_s": [min(starts), max(starts)] if starts else None,
        "changes": result["changes"],
        "gain": result["gain"],
        "proven": result["proven"],
        "verdict": result["verdict"],
        "default": _side(result["baseline"], result["baseline_slo"]),
        "winner": _side(result["winner"], result["slo"]),
        "rounds": [
            {"round": t.round, "config": _changes(run, t.config), "objective": t.objective}
            for t in trials
            if t.kind == "proof"
        ],
        "notes": result["notes"],
    }


def _side(metrics: Mapping[str, Any] | None, limits: list[dict[str, Any]]) -> dict[str, Any] | None:
    if metrics is None:
        return None
    latencies = {name: metrics[name] for name in ("ttft", "tpot", "itl", "e2e")}
    return {**latencies, **{name: metrics[name] for name in _METRICS}, "slo": limits}


def _changes(run: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    default = run["engine_config"]
    return {name: value for name, value in config.items() if value != default.get(name)}


def main() -> None:
    """Read a run, write its summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("vllm_tuned.json"))
    arguments = parser.parse_args()
    text = json.dumps(summary(arguments.run), indent=1) + "\n"
    arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
