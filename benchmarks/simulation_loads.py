"""Measure what the simulator is to foretell: configurations at 50, 85 and 95% of their capacity.

Everything that a prediction may rest on is measured in the same hour: the machine's ceilings and
probes, the calibration's load and the default's under the workload. The held-out configurations are
measured at loads of their own. Around each of these the default is measured again for a moment: a
machine's speed changes from minute to minute, and that is not what a prediction is to be blamed
for. `benchmarks.simulation_accuracy` predicts them from these records, so that a better model can
be judged without measuring again.

    python -m benchmarks.simulation_loads FOLDER [--model embedded] [--rounds 2] [--requests 1000]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from autotune.calibration import sustained_rate
from autotune.hardware.detect import describe_hardware
from autotune.load.open_loop import LoadResult, run_load
from autotune.loaded_engines import LoadedEngines
from autotune.measure import Measurement, at_rate, measure
from autotune.model_info import ModelInfo, read_model_info, with_default_model
from autotune.predict.calibration_load import calibration_load
from autotune.profiling.machine import calibrate_machine
from autotune.profiling.model_facts import model_facts
from autotune.records import RunFolder, utc_now
from autotune.slo import parse_slo
from autotune.traffic import load_traffic
from autotune.traffic_options import TrafficOptions
from autotune.workload.materialise import LoadRequest
from benchmarks.advice_engines import DRAIN_LIMIT_S, WARM_REQUESTS, model_folder
from benchmarks.quiet_machine import undisturbed
from engine.config import EngineConfig
from engine.engine import Engine

SLO = parse_slo("ttft<200ms,tpot<100ms")
LOADS = (0.5, 0.85, 0.95)
BURST = 256
PROBES_S = 12.0
# The default's moments between the others' loads: requests, at this share of what it sustains.
REFERENCE_REQUESTS = 120
REFERENCE_SHARE = LOADS[0]
METHODS = ("none", "int8", "int4")
CACHES = ("auto", "int8")
# The first is what everything is calibrated on; the others are held out.
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
    "int8 cache": {"kv_cache_dtype": "int8"},
    "few seats": {"max_num_seqs": 12},
    "small steps": {"max_num_batched_tokens": 96, "max_num_seqs": 64},
    "sjf, int8": {"scheduling_policy": "sjf", "quantization": "int8", "block_size": 32},
}


def workload(
    base: EngineConfig, info: ModelInfo, source: str, rate: float | None, count: int, seed: int
) -> list[LoadRequest]:
    """Requests of a preset or a trace at a rate a second; all at once without one."""
    options = TrafficOptions(
        source=source, rate=rate, requests=count, duration_s=3600.0, length_factor=0.25
    )
    traffic = load_traffic(options, info, base, seed)
    if rate is None:
        return traffic.burst(count)
    return traffic.windows(rate, count / rate, count=1).windows[0][:count]


class Loads:
    """Measures loads and keeps their records in a folder, a line of `loads.jsonl` each."""

    def __init__(self, path: Path, model: str, requests: int, seed: int) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self._folder = RunFolder(path)
        self._lines = path / "loads.jsonl"
        self._number = len(self._lines.read_text().splitlines()) if self._lines.exists() else 0
        self._base = with_default_model(EngineConfig.from_mapping({"model": model, "seed": seed}))
        self._engines = LoadedEngines(keep=True)
        self._info = read_model_info(self._base)
        self._requests = requests
        self._seed = seed
        self._sustained = 0.0  # by the default

    def calibrate(self) -> None:
        """Ceilings, probes, and the calibration's load for each method and cache."""
        loaded = self._engines.loaded(self._base)
        machine = calibrate_machine(
            loaded, self._base, model_facts(self._base), METHODS, CACHES, budget_s=PROBES_S
        )
        body = {
            "ceilings": machine.ceilings.model_dump(),
            "probes": machine.probes.model_dump(),
            "hardware": describe_hardware("cpu"),
            "created_at": utc_now(),
        }
        (self._folder.path / "machine.json").write_text(json.dumps(body))
        for method in METHODS:
            self._sweep({"quantization": method})
        self._sweep({"kv_cache_dtype": "int8"})

    def measure_config(self, name: str, source: str, round_: int) -> None:
        """One configuration: all at once to find what it sustains, then each load."""
        config = self._base.replace(**CONFIGS[name])
        engine = self._engines.engine(config)
        burst = at_rate(self._workload(source, None, BURST), None)

        def at_once() -> LoadResult:
            engine.clear_prefix_cache()
            return run_load(engine, burst, drain_limit=DRAIN_LIMIT_S)

        load, others = undisturbed(at_once)
        sustained = sustained_rate(load.records, load.duration)
        held_out = bool(CONFIGS[name])
        if not held_out:
            self._sustained = sustained
        self._keep(
            "burst", name, config, load.records, load.steps, source, round_, None, None, others
        )
        for share in LOADS:
            if held_out:
                self._refer(source, round_)
            began = time.monotonic()
            rate = share * sustained
            requests = self._workload(source, rate, self._requests)
            engine = self._engines.engine(config)
            done, others = undisturbed(partial(self._measure, engine, config, requests))
            self._keep(
                *("load", name, config, done.records, done.steps, source, round_, share),
                done.metrics,
                others,
            )
            m = done.metrics
            print(
                f"{source} round {round_} {name} {share:.0%} of {sustained:.3g}/s: "
                f"ttft {m['ttft']['mean'] * 1e3:.1f}/{m['ttft']['p99'] * 1e3:.1f} "
                f"tpot {m['tpot']['mean'] * 1e3:.2f}/{m['tpot']['p99'] * 1e3:.2f} "
                f"e2e {m['e2e']['mean'] * 1e3:.0f}/{m['e2e']['p99'] * 1e3:.0f} ms "
                f"{time.monotonic() - began:.0f} s"
                + ("" if others is None else f", others {others:.0%}"),
                flush=True,
            )
        if held_out:
            self._refer(source, round_)

    def _refer(self, source: str, round_: int) -> None:
        """The default for a moment: how fast the machine is now."""
        engine = self._engines.engine(self._base)
        rate = REFERENCE_SHARE * self._sustained
        requests = self._workload(source, rate, REFERENCE_REQUESTS)
        done, others = undisturbed(partial(self._measure, engine, self._base, requests))
        self._keep(
            *("reference", "default", self._base, done.records, done.steps, source, round_),
            *(REFERENCE_SHARE, None, others),
        )

    def _measure(
        self, engine: Engine, config: EngineConfig, requests: Sequence[LoadRequest]
    ) -> Measurement:
        run_load(engine, at_rate(requests[:WARM_REQUESTS], None), drain_limit=DRAIN_LIMIT_S)
        engine.clear_prefix_cache()
        return measure(
            engine, requests, slo=SLO, config=config, drain_limit=DRAIN_LIMIT_S, seed=self._seed
        )

    def _workload(self, source: str, rate: float | None, count: int) -> list[LoadRequest]:
        return workload(self._base, self._info, source, rate, count, self._seed)

    def _sweep(self, knobs: Mapping[str, Any]) -> None:
        config = self._base.replace(**knobs)
        engine = self._engines.engine(config)
        began = time.monotonic()
        parts = calibration_load(
            self._info.vocab_size, engine.max_model_len, config.max_num_seqs, self._seed
        )

        def sweep() -> list[LoadResult]:
            loads = []
            for part in parts:
                engine.clear_prefix_cache()
                loads.append(run_load(engine, part, drain_limit=DRAIN_LIMIT_S))
            return loads

        swept, others = undisturbed(sweep)
        records = [record for load in swept for record in load.records]
        steps = [step for load in swept for step in load.steps]
        print(f"swept {dict(knobs)} in {time.monotonic() - began:.1f} s, {len(steps)} steps")
        self._keep("sweep", str(dict(knobs)), config, records, steps, "", 0, None, None, others)

    def _keep(
        self,
        kind: str,
        name: str,
        config: EngineConfig,
        records: Any,
        steps: Any,
        source: str,
        round_: int,
        share: float | None,
        metrics: dict[str, Any] | None,
        others: float | None,
    ) -> None:
        self._folder.write_part(self._number, records, steps)
        line = {
            "trial": self._number,
            "kind": kind,
            "name": name,
            "source": source,
            "round": round_,
            "share": share,
            "config": config.to_dict(),
            "metrics": metrics,
            "others": others,
            "at": utc_now(),
        }
        with self._lines.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._number += 1


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--source", action="append", help="preset or trace; may be repeated")
    arguments = parser.parse_args()
    with model_folder(arguments.model) as model:
        loads = Loads(arguments.folder, model, arguments.requests, seed=0)
        loads.calibrate()
        for round_ in range(arguments.rounds):
            for source in arguments.source or ["chat"]:
                for name in CONFIGS:
                    loads.measure_config(name, source, round_)


if __name__ == "__main__":
    main()
