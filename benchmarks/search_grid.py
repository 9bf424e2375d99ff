"""Measure every configuration of a grid, once a round, as the search itself would measure it.

The folder is a run folder: `trials.jsonl` has a line for each point and round, the parts hold the
requests and steps, and `probes.json` what the calibration of the machine found in the same hour. A
killed measurement goes on where it was. `benchmarks.search` lets strategies search in it.

    python -m benchmarks.search_grid FOLDER --scenario throughput [--rounds 2]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotune.records import RunFolder
from autotune.search.evaluator import Evaluator
from autotune.search.messages import Failed, ProbeCommand
from autotune.search.options import TuneOptions
from autotune.search.prepare import Prepared, offer_traffic, open_folder, prepare
from autotune.search.trials import TrialRunner
from autotune.traffic_options import TrafficOptions
from engine.config import KNOBS, EngineConfig
from engine.errors import ConfigError

PROBES_NAME = "probes.json"
PROBES_S = 12.0
KNOB_VALUES: Mapping[str, tuple[Any, ...]] = {
    "quantization": ("none", "int8", "int4"),
    "kv_cache_dtype": ("auto", "int8"),
    "max_num_seqs": (4, 8, 16, 32, 64, 128),
    "max_num_batched_tokens": (128, 256, 512, 2048),
}


@dataclass(frozen=True, slots=True)
class Scenario:
    """A traffic and a promise under which the grid is measured."""

    traffic: TrafficOptions
    slo: str
    objective: str


SCENARIOS: Mapping[str, Scenario] = {
    # A batch job beside readers: all requests at once, at no less than a reader's pace.
    "throughput": Scenario(
        TrafficOptions(source="chat", length_factor=0.6, rate=math.inf, requests=64),
        "tpot<12ms",
        "throughput",
    ),
    # Interactive traffic, more of it than the default serves in time.
    "goodput": Scenario(
        TrafficOptions(source="chat", length_factor=0.25, rate=85.0, duration_s=3.0),
        "ttft<250ms,tpot<12ms",
        "goodput",
    ),
}


def options_of(scenario: Scenario, seed: int = 0) -> TuneOptions:
    """The options of a run in the grid's space."""
    return TuneOptions(
        traffic=scenario.traffic,
        slo=scenario.slo,
        objective=scenario.objective,  # type: ignore[arg-type]
        narrowing={name: list(values) for name, values in KNOB_VALUES.items()},
        budget_s=None,
        trials=10_000,
        seed=seed,
    )


def points(base: EngineConfig) -> Iterator[EngineConfig]:
    """Every configuration of the grid, dearest reload outermost."""
    names = sorted(
        KNOB_VALUES, key=lambda name: ("weights", "cache", "live").index(KNOBS[name].reload)
    )
    for values in itertools.product(*(KNOB_VALUES[name] for name in names)):
        try:
            yield base.replace(**dict(zip(names, values, strict=True)))
        except ConfigError:  # fewer tokens than seats
            continue


def measure_grid(path: Path, scenario: Scenario, rounds: int, only: int | None = None) -> None:
    """Measure what is not on disk yet; `only` bounds the points of a round, for a trial run."""
    stop = threading.Event()
    resumed = (path / "run.json").exists()
    with open_folder(path, resume=resumed) as folder:
        prepared = prepare(folder, None if resumed else options_of(scenario), ["search_grid"])
        if not prepared.run.get("workload"):
            offer_traffic(folder, prepared, saturated=None, final=True)
        with Evaluator(folder, stop) as evaluator:
            _probe(folder, prepared, evaluator)
            _measure(folder, prepared, evaluator, rounds, only)


def _probe(folder: RunFolder, prepared: Prepared, evaluator: Evaluator) -> None:
    path = folder.path / PROBES_NAME
    if path.exists():
        return
    base = prepared.base
    methods = list(KNOB_VALUES["quantization"])
    reply = evaluator.probe(
        ProbeCommand(base.to_dict(), methods, list(KNOB_VALUES["kv_cache_dtype"]), PROBES_S)
    )
    assert not isinstance(reply, Failed), reply.reason
    path.write_text(json.dumps({"ceilings": reply.ceilings, "probes": reply.probes}))


def _measure(
    folder: RunFolder, prepared: Prepared, evaluator: Evaluator, rounds: int, only: int | None
) -> None:
    options = prepared.options
    earlier = folder.read_trials()
    done = {(t.round, str(t.config)) for t in earlier}
    trials = TrialRunner(
        folder,
        evaluator,
        options.parsed_slo,
        options.parsed_objective,
        prepared.schedule,
        options.seed,
        next_number=len(earlier),
        at_once=options.traffic.rate == math.inf,
    )
    for round_ in range(rounds):
        todo = [c for c in points(prepared.base) if (round_, str(c.to_dict())) not in done]
        for place, config in enumerate(todo[:only]):
            began = time.monotonic()
            record = trials.run("search", "grid", config, round_=round_)
            shown = {name: getattr(config, name) for name in KNOB_VALUES}
            value = "-" if record.objective is None else f"{record.objective:.4g}"
            print(
                f"round {round_} {place + 1}/{len(todo)} {shown} {record.outcome} {value} "
                f"met={record.slo_met} {time.monotonic() - began:.1f} s",
                flush=True,
            )


def main() -> None:
    """Measure a grid."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenario", choices=list(SCENARIOS), required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", type=int, help="points of a round, for a trial run")
    arguments = parser.parse_args()
    scenario = SCENARIOS[arguments.scenario]
    measure_grid(arguments.folder, scenario, arguments.rounds, arguments.only)


if __name__ == "__main__":
    main()
