"""How far simulated latencies are from measured ones, on configurations that were held out.

The calibration sees what `benchmarks.simulation_loads` measured for it: ceilings and probes, the
sweeps, and the default's own loads. Everything else is foretold from the traffic alone (prompts,
lengths and intended times, at 50, 85 and 95% of what a configuration sustains) and compared with
what was measured, latency by latency, at the mean and at the 99th percentile. Only what the machine
added to each step at that moment is taken from moments of the default before and after.

    python -m benchmarks.simulation_loads FOLDER
    python -m benchmarks.simulation_accuracy FOLDER [FOLDER ...] [--out simulation_accuracy.json]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autotune.hardware.versions import library_versions
from autotune.model_info import read_model_info, with_default_model
from autotune.predict.calibration import Calibration, fit_calibration
from autotune.predict.calibration_sample import CalibrationLoad
from autotune.predict.cost_model import CostDraw
from autotune.predict.step_cost import StepWork
from autotune.predict.step_times import DecodeLine
from autotune.predict.virtual_engine import Cost
from autotune.profiling.machine import MachineCalibration
from autotune.profiling.model_facts import model_facts
from autotune.profiling.schema import Ceilings, Probes
from autotune.records import RunFolder, utc_now
from autotune.simulation.interval import Interval
from autotune.simulation.simulate import simulate
from autotune.workload.materialise import LoadRequest
from benchmarks.advice_engines import DRAIN_LIMIT_S, model_folder
from benchmarks.exact_tests import proportion_interval
from benchmarks.simulation_loads import CONFIGS, LOADS, REFERENCE_SHARE, SLO, workload
from engine.config import EngineConfig
from engine.engine import CacheShape

FITTED = next(iter(CONFIGS))
LATENCIES = ("ttft", "tpot", "e2e")
STATISTICS = ("mean", "p99")
RESAMPLES = 4000


@dataclass(frozen=True, slots=True)
class Point:
    """One number that was foretold and measured; times in seconds."""

    folder: str
    source: str
    name: str
    round: int
    share: float
    metric: str
    statistic: str
    measured: float
    predicted: Interval
    delay: float  # of a step of the default then

    @property
    def error(self) -> float:
        """Relative to what was measured."""
        return abs(self.predicted.value / self.measured - 1)

    @property
    def covered(self) -> bool:
        """Whether the interval holds what was measured."""
        return self.predicted.low <= self.measured <= self.predicted.high

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**dataclasses.asdict(self), "error": self.error, "covered": self.covered}


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """What was measured, in order."""
    return [json.loads(line) for line in (folder / "loads.jsonl").read_text().splitlines()]


def config_of(line: Mapping[str, Any], model: str) -> EngineConfig:
    """The config of a line, with the model where it lies now."""
    return with_default_model(EngineConfig.from_mapping({**line["config"], "model": model}))


def calibration_of(folder: Path, lines: Sequence[Mapping[str, Any]], model: str) -> Calibration:
    """Fitted to the sweeps and to the default's loads, as `autotune profile` would have them."""
    machine = json.loads((folder / "machine.json").read_text())
    records = RunFolder(folder)
    loads = []
    for line in lines:
        if line["kind"] == "sweep" or (line["kind"] == "load" and line["name"] == FITTED):
            number = line["trial"]
            loads.append(
                CalibrationLoad(
                    config_of(line, model),
                    records.read_steps(number),
                    records.read_requests(number),
                    line["kind"],
                )
            )
    return fit_calibration(
        loads,
        MachineCalibration(
            Ceilings.model_validate(machine["ceilings"]), Probes.model_validate(machine["probes"])
        ),
        model_facts(loads[0].config),
        hardware=machine["hardware"],
        engine_version=library_versions()["autotune"] or "",
        created_at=machine["created_at"],
    )


def offered(folder: Path, line: Mapping[str, Any], base: EngineConfig) -> list[LoadRequest]:
    """The load of a line: the traffic's requests at the times at which they were to be sent."""
    records = {r.request_id: r for r in RunFolder(folder).read_requests(line["trial"])}
    info = read_model_info(base)
    rate = line["metrics"]["offered_rate"]
    requests = workload(base, info, line["source"], rate, len(records), base.seed)
    if any(len(r.token_ids) != records[r.request_id].input_tokens for r in requests):
        raise SystemExit(f"{folder}: trial {line['trial']} was offered other requests")
    return [dataclasses.replace(r, arrival_s=records[r.request_id].intended_send) for r in requests]


@dataclass(frozen=True)
class Delayed:
    """A cost whose steps take so many seconds more on the host, each."""

    cost: Cost
    seconds: float

    def device_seconds(self, work: StepWork) -> float:
        """Seconds on the device."""
        return self.cost.device_seconds(work)

    def host_seconds(self, work: StepWork) -> float:
        """Seconds on the host."""
        return self.cost.host_seconds(work) + self.seconds

    def decode_line(self, sequences: int) -> DecodeLine | None:
        """Seconds of steps of decodes."""
        line = self.cost.decode_line(sequences)
        if line is None:
            return None
        return DecodeLine(line.tokens, tuple(s + self.seconds for s in line.seconds))


@dataclass(frozen=True)
class AtMoment:
    """A calibration on its machine at another moment, when each step took `delay` seconds more."""

    calibration: Calibration
    delay: float

    def middle(self, config: EngineConfig) -> CostDraw:
        """The likeliest cost."""
        return self._now(self.calibration.middle(config))

    def draws(self, config: EngineConfig, count: int, seed: int) -> list[CostDraw]:
        """Costs drawn from what may be so."""
        return [self._now(draw) for draw in self.calibration.draws(config, count, seed)]

    def cache(self, config: EngineConfig) -> CacheShape | None:
        """The KV cache."""
        return self.calibration.cache(config)

    def _now(self, draw: CostDraw) -> CostDraw:
        return dataclasses.replace(draw, cost=Delayed(draw.cost, self.delay))


def excess(
    folder: Path, lines: Sequence[Mapping[str, Any]], calibration: Calibration, model: str
) -> float:
    """How many seconds more than its cost a step of these loads took, on the median."""
    seconds: list[float] = []
    for line in lines:
        cost = calibration.middle(config_of(line, model)).cost
        for step in RunFolder(folder).read_steps(line["trial"]):
            work = StepWork.of(step)
            seconds.append(step.seconds - cost.device_seconds(work) - cost.host_seconds(work))
    return statistics.median(seconds)


def delays_of(
    folder: Path, lines: Sequence[Mapping[str, Any]], calibration: Calibration, model: str
) -> dict[int, float]:
    """By load, how much longer the machine took for a step than when it was calibrated, in seconds.

    As the default's moments before and after tell, against the load of the default that was like
    them. What slows this machine down for minutes adds to each step and does not multiply it. None
    for the default's own loads, and where there are no such moments.
    """
    like = [
        line
        for line in lines
        if line["kind"] == "load" and line["name"] == FITTED and line["share"] == REFERENCE_SHARE
    ]
    usual = excess(folder, like, calibration, model) if like else 0.0
    before: Mapping[str, Any] | None = None
    told: dict[int, float] = {}
    for place, line in enumerate(lines):
        if line["kind"] == "reference":
            before = line
        if line["kind"] != "load" or line["name"] == FITTED or before is None or not like:
            continue
        after = next((other for other in lines[place:] if other["kind"] == "reference"), before)
        told[line["trial"]] = excess(folder, [before, after], calibration, model) - usual
    return told


def points_of(folder: Path, model: str, draws: int, seed: int) -> Iterator[Point]:
    """Every load of a folder, foretold."""
    lines = lines_of(folder)
    calibration = calibration_of(folder, lines, model)
    delays = delays_of(folder, lines, calibration, model)
    for line in lines:
        if line["kind"] != "load":
            continue
        config = config_of(line, model)
        requests = offered(folder, line, calibration.config)
        began = time.perf_counter()
        delay = delays.get(line["trial"], 0.0)
        found = simulate(
            AtMoment(calibration, delay),
            config,
            requests,
            slo=SLO,
            draws=draws,
            seed=seed,
            drain_limit=DRAIN_LIMIT_S,
        )
        seconds = time.perf_counter() - began
        shown = []
        for metric in LATENCIES:
            for statistic in STATISTICS:
                measured = line["metrics"][metric][statistic]
                predicted = found.metrics[metric][statistic]
                point = Point(
                    folder.name,
                    line["source"],
                    line["name"],
                    line["round"],
                    line["share"],
                    metric,
                    statistic,
                    measured,
                    predicted,
                    delay,
                )
                shown.append(f"{predicted.value / measured - 1:+.0%}{'' if point.covered else '!'}")
                yield point
        what = f"{line['source']} {line['name']} {line['share']:.0%}"
        errors = " ".join(f"{text:>6}" for text in shown)
        print(f"{what:<28}{errors}  {delay * 1e3:+.2f} ms a step  {seconds:.1f} s", flush=True)


def summary_of(points: Sequence[Point]) -> dict[str, Any]:
    """Median errors and coverage: all, by latency and statistic, and by load."""
    return {
        "all": _fared(points),
        **{
            f"{metric} {statistic}": {
                "all loads": _fared(_of(points, metric, statistic)),
                "up to 85%": _fared([p for p in _of(points, metric, statistic) if p.share <= 0.85]),
                **{
                    f"{share:.0%}": _fared(
                        [p for p in _of(points, metric, statistic) if p.share == share]
                    )
                    for share in LOADS
                },
            }
            for metric in LATENCIES
            for statistic in STATISTICS
        },
    }


def _of(points: Sequence[Point], metric: str, statistic: str) -> list[Point]:
    return [p for p in points if (p.metric, p.statistic) == (metric, statistic)]


def _fared(points: Sequence[Point]) -> dict[str, Any]:
    """Median error with its interval, bias, and how many intervals held.

    Both intervals (95%) take configurations, not single numbers, for what chance chose: loads and
    rounds of one configuration err alike.
    """
    if not points:
        return {"numbers": 0}
    by_config: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        by_config.setdefault((point.folder, point.name), []).append(point)
    groups = list(by_config.values())
    rng = np.random.default_rng(0)
    medians, shares = [], []
    for _ in range(RESAMPLES):
        drawn = [p for i in rng.integers(0, len(groups), len(groups)) for p in groups[i]]
        medians.append(statistics.median(p.error for p in drawn))
        shares.append(sum(p.covered for p in drawn) / len(drawn))
    covered = sum(p.covered for p in points)
    return {
        "numbers": len(points),
        "configurations": len(groups),
        "median_error": statistics.median(p.error for p in points),
        "median_error_interval": [float(v) for v in np.quantile(medians, (0.025, 0.975))],
        "p90_error": float(np.quantile([p.error for p in points], 0.9)),
        "bias": math.exp(
            statistics.median(math.log(p.predicted.value / p.measured) for p in points)
        )
        - 1,
        "coverage": covered / len(points),
        "coverage_interval_by_configuration": [
            float(v) for v in np.quantile(shares, (0.025, 0.975))
        ],
        "coverage_interval_exact": list(proportion_interval(covered, len(points))),
        "median_width": statistics.median(
            (p.predicted.high - p.predicted.low) / p.predicted.value for p in points
        ),
    }


def print_table(summary: Mapping[str, Any], title: str) -> None:
    """Median errors by load, and coverage."""
    print(f"\n{title}: median relative error, by load, and coverage of 90% intervals")
    columns = ["50%", "85%", "95%", "up to 85%", "all loads"]
    print("".ljust(12) + "".join(c.rjust(11) for c in columns) + "covered".rjust(11))
    for metric in LATENCIES:
        for statistic in STATISTICS:
            row = summary[f"{metric} {statistic}"]
            cells = [f"{row[c]['median_error']:.1%}" if row[c]["numbers"] else "-" for c in columns]
            covered = row["all loads"].get("coverage")
            print(
                f"{metric} {statistic}".ljust(12)
                + "".join(c.rjust(11) for c in cells)
                + ("-" if covered is None else f"{covered:.0%}").rjust(11)
            )
    total = summary["all"]
    if total["numbers"]:
        low, high = total["coverage_interval_by_configuration"]
        print(
            f"in all {total['numbers']} numbers of {total['configurations']} configurations: "
            f"{total['coverage']:.1%} covered [{low:.0%}, {high:.0%}]"
        )


def main() -> None:
    """Compare and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    began = time.perf_counter()
    with model_folder(options.model) as model:
        points = [
            point
            for folder in options.folders
            for point in points_of(folder, model, options.draws, options.seed)
        ]
    held_out = summary_of([p for p in points if p.name != FITTED])
    fitted = summary_of([p for p in points if p.name == FITTED])
    print_table(held_out, "held out")
    print_table(fitted, "the default, which was fitted")
    machine = json.loads((options.folders[0] / "machine.json").read_text())
    report = {
        "machine": machine["hardware"],
        "measured_at": machine["created_at"],
        "versions": library_versions(),
        "at": utc_now(),
        "seconds": time.perf_counter() - began,
        "options": {"model": options.model, "draws": options.draws, "seed": options.seed},
        "held_out": held_out,
        "fitted": fitted,
        "points": [point.to_json() for point in points],
    }
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
