"""One configuration under a workload, in this process: what `autotune bench` calls."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotune.calibration import (
    CALIBRATION_LIMIT_S,
    CALIBRATION_REQUESTS,
    offered_rate,
    sustained_rate,
)
from autotune.errors import BadInput, EnvironmentMissing, Interrupted
from autotune.hardware.detect import describe_hardware
from autotune.hardware.versions import library_versions
from autotune.load.open_loop import run_load
from autotune.measure import Measurement, at_rate, measure
from autotune.model_info import read_model_info, with_default_model
from autotune.quality import QualityMeter, check_measurable, is_reference
from autotune.quality_guard import quality_entries, uncertain_limits
from autotune.records import SCHEMA_VERSION, LimitResult, RunFolder, utc_now
from autotune.slo import parse_slo
from autotune.traffic import load_traffic
from autotune.traffic_options import TrafficOptions
from engine.config import EngineConfig
from engine.loading import load_model

WARMUP_REQUESTS = 4


@dataclass(frozen=True, slots=True)
class BenchOutcome:
    """What one bench measured, and under what."""

    config: EngineConfig
    model: dict[str, Any]
    workload: dict[str, Any]
    measurement: Measurement
    slo_text: str
    slo: list[LimitResult]
    notes: list[str]

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
    parsed = parse_slo(slo)
    base = with_default_model(EngineConfig.from_mapping(knobs))
    base = base.replace(device=describe_hardware(base.device)["device"])
    model = read_model_info(base)
    check_measurable(parsed, base)
    source = load_traffic(traffic, model, base, base.seed)
    say("loading the model")
    loaded = load_model(base)
    engine = loaded.engine(base)
    notes = list(loaded.notes)
    rate = traffic.rate
    warm = source.burst(WARMUP_REQUESTS)
    run_load(engine, warm, drain_limit=CALIBRATION_LIMIT_S, stop=stop)
    _go_on_unless(stop)
    if traffic.rate_is_measured:
        say("calibrating: all requests at once")
        burst = measure(
            engine,
            at_rate(source.burst(CALIBRATION_REQUESTS), None),
            slo=parsed,
            config=base,
            drain_limit=CALIBRATION_LIMIT_S,
            seed=base.seed,
            stop=stop,
        )
        _go_on_unless(stop)
        sustained = sustained_rate(burst.records, burst.metrics["duration_s"])
        if not sustained:
            raise BadInput(
                f"no request of the calibration finished within {CALIBRATION_LIMIT_S:.0f} s: give "
                "--rate, shorter lengths (--scale-lengths) or a smaller model"
            )
        rate, note = offered_rate(traffic, sustained)
        notes.append(note)
    assert traffic.duration_s is not None
    offered = source.windows(rate, traffic.duration_s, count=1)
    notes += offered.notes
    requests = offered.windows[0]
    engine.clear_prefix_cache()
    _go_on_unless(stop)
    measurement = measure(
        engine,
        requests,
        slo=parsed,
        config=base,
        drain_limit=drain_limit,
        seed=base.seed,
        on_progress=lambda done: say(f"measuring: {done.left}/{done.total} requests"),
        stop=stop,
    )
    stopped = stop is not None and stop.is_set()
    if not stopped and (parsed.needs_quality or not is_reference(base)):
        say("scoring the held-out text")
        with tempfile.TemporaryDirectory() as scratch:
            quality = QualityMeter(Path(scratch)).measure(loaded, base)
        measurement.metrics.update(quality_entries(quality))
        notes += uncertain_limits(parsed, quality)
    return BenchOutcome(
        config=base,
        model=model.to_json(),
        workload=offered.description,
        measurement=measurement,
        slo_text=str(parsed),
        slo=parsed.evaluate(measurement.metrics),
        notes=notes,
    )


def _go_on_unless(stop: threading.Event | None) -> None:
    if stop is not None and stop.is_set():
        raise Interrupted("Interrupted before anything was measured.")


@contextmanager
def claim_output(path: Path | None) -> Iterator[None]:
    """Make the folder that will take the result, before anything is measured.

    It goes away again if nothing was put into it.

    Raises:
        BadInput: it is in use.
        EnvironmentMissing: it cannot be made.
    """
    if path is None:
        yield
        return
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise BadInput(f"output folder {path} exists and is not empty: choose another with -o")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentMissing(f"output folder {path} cannot be made: {error}") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.rmdir()  # only if it is empty


def save(outcome: BenchOutcome, path: Path, command: Sequence[str]) -> None:
    """Write `run.json`, `bench.json`, `requests.parquet` and `steps.parquet` into the folder."""
    folder = RunFolder(path)
    folder.write_part(0, outcome.measurement.records, outcome.measurement.steps)
    folder.merge_parts()
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
