"""One configuration under a workload, in this process: what `autotune bench` calls."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotune.hardware.detect import describe_hardware
from autotune.hardware.versions import library_versions
from autotune.measure import Measurement, measure
from autotune.prepared_load import prepare_load
from autotune.quality import QualityMeter, is_reference
from autotune.quality_guard import quality_entries, uncertain_limits
from autotune.records import SCHEMA_VERSION, LimitResult, RunFolder, utc_now
from autotune.search.windows import write_windows
from autotune.traffic_options import TrafficOptions
from autotune.workload.materialise import LoadRequest
from engine.config import EngineConfig


@dataclass(frozen=True, slots=True)
class BenchOutcome:
    """What one bench measured, and under what; `requests` is what was offered."""

    config: EngineConfig
    model: dict[str, Any]
    workload: dict[str, Any]
    measurement: Measurement
    slo_text: str
    slo: list[LimitResult]
    notes: list[str]
    requests: list[LoadRequest]

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics, by the keys of `bench --json`."""
        return self.measurement.metrics

    @property
    def slo_met(self) -> bool:
        """Whether every limit is met and the load was delivered as asked."""
        return all(limit.met for limit in self.slo) and self.metrics["load_delivered"]


def bench(
    knobs: Mapping[str, Any],
    traffic: TrafficOptions,
    *,
    slo: str,
    drain_limit: float,
    say: Callable[[str], None] = lambda _: None,
    stop: threading.Event | None = None,
) -> BenchOutcome:
    """Measure one configuration.

    Args:
        knobs: those that differ from the engine's defaults.
        traffic: the workload; `duration_s` must be set.
        slo: limits that goodput is counted by.
        drain_limit: seconds after the last arrival at which unfinished requests are given up.
        say: told what is going on, for a progress line.
        stop: set it to end the load early.

    Raises:
        BadInput: bad traffic or SLO.
        Interrupted: `stop` was set before the load began.
        engine.errors.EngineError: the model or the config cannot be used.
    """
    with prepare_load(knobs, traffic, slo=slo, say=say, stop=stop) as load:
        notes = list(load.notes)
        measurement = measure(
            load.engine,
            load.requests,
            slo=load.slo,
            config=load.config,
            drain_limit=drain_limit,
            seed=load.config.seed,
            on_progress=lambda done: say(f"measuring: {done.left}/{done.total} requests"),
            stop=stop,
        )
        stopped = stop is not None and stop.is_set()
        if not stopped and (load.slo.needs_quality or not is_reference(load.config)):
            say("scoring the held-out text")
            with tempfile.TemporaryDirectory() as scratch:
                quality = QualityMeter(Path(scratch)).measure(load.loaded, load.config)
            measurement.metrics.update(quality_entries(quality))
            notes += uncertain_limits(load.slo, quality)
    return BenchOutcome(
        config=load.config,
        model=load.model.to_json(),
        workload=load.offered.description,
        measurement=measurement,
        slo_text=str(load.slo),
        slo=load.slo.evaluate(measurement.metrics),
        notes=notes,
        requests=load.requests,
    )


def save(outcome: BenchOutcome, path: Path, command: Sequence[str]) -> None:
    """Write `run.json`, `bench.json`, the records and what was offered into the folder."""
    folder = RunFolder(path)
    folder.write_part(0, outcome.measurement.records, outcome.measurement.steps)
    folder.merge_parts()
    write_windows(folder, [outcome.requests])
    folder.write_json(path / "bench.json", outcome.metrics)
    folder.write_json(
        folder.run_json,
        {
            "schema_version": SCHEMA_VERSION,
            "kind": "bench",
            "command": list(command),
            "started_at": utc_now(),
            "status": "done",
            "model": outcome.model,
            "engine_config": outcome.config.to_dict(),
            "workload": outcome.workload,
            "slo": outcome.slo_text,
            "hardware": describe_hardware(outcome.config.device),
            "versions": library_versions(),
            "seeds": {"seed": outcome.config.seed},
            "notes": outcome.notes,
        },
    )
