"""One measurement: a load on a live engine, and its metrics."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from autotune.load.open_loop import LoadProgress, run_load
from autotune.metrics import compute_metrics
from autotune.records import RequestRecord
from autotune.slo import Slo
from autotune.workload.materialise import LoadRequest
from engine.config import EngineConfig
from engine.engine import Engine
from engine.step_record import StepRecord


@dataclass(frozen=True, slots=True)
class Measurement:
    """Metrics (keys of `bench --json`) and the records they were computed from."""

    metrics: dict[str, Any]
    records: list[RequestRecord]
    steps: list[StepRecord]


def at_rate(requests: Sequence[LoadRequest], factor: float | None) -> list[LoadRequest]:
    """The same requests at `factor` times their rate; None offers all of them at once."""
    return [
        dataclasses.replace(r, arrival_s=0.0 if factor is None else r.arrival_s / factor)
        for r in requests
    ]


def measure(
    engine: Engine,
    requests: Sequence[LoadRequest],
    *,
    slo: Slo,
    config: EngineConfig,
    drain_limit: float,
    seed: int,
    on_progress: Callable[[LoadProgress], None] | None = None,
    stop: threading.Event | None = None,
) -> Measurement:
    """Offer `requests` at their arrival times and compute the metrics of `bench`.

    Args:
        engine: idle engine, configured as `config`.
        requests: arrivals in seconds from the start of the load.
        slo: limits for goodput and attainment.
        config: put into the metrics.
        drain_limit: seconds after the last arrival at which what is unfinished is given up.
        seed: of the bootstrap.
        on_progress: told now and then how far the load is.
        stop: set to end the load early and keep what was measured.
    """
    load = run_load(
        engine,
        requests,
        slo=slo,
        drain_limit=drain_limit,
        on_progress=on_progress,
        stop=stop,
    )
    metrics = compute_metrics(
        load.records,
        slo,
        duration=load.duration,
        config=config,
        load_delivered=load.delivered,
        load_note=load.note,
        steps=load.steps,
        seed=seed,
    )
    return Measurement(metrics, load.records, load.steps)
