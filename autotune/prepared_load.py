"""A model loaded and warm, and the requests to offer it: what comes before a measurement."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from autotune.calibration import (
    CALIBRATION_LIMIT_S,
    CALIBRATION_REQUESTS,
    offered_rate,
    sustained_rate,
)
from autotune.errors import BadInput, Interrupted
from autotune.hardware.detect import describe_hardware
from autotune.load.open_loop import run_load
from autotune.measure import at_rate, measure
from autotune.model_info import ModelInfo, read_model_info, with_default_model
from autotune.quality import check_measurable
from autotune.slo import Slo, parse_slo
from autotune.traffic import Offered, Traffic, load_traffic
from autotune.traffic_options import TrafficOptions
from autotune.workload.materialise import LoadRequest
from engine.config import EngineConfig
from engine.engine import Engine
from engine.loading import LoadedModel, load_model

WARMUP_REQUESTS = 4


@dataclass(frozen=True, slots=True)
class PreparedLoad:
    """An idle, warm engine, and one window of requests for it.

    `config` names model and device; `notes` are on the checkpoint, the rate and the traffic.
    """

    config: EngineConfig
    slo: Slo
    model: ModelInfo
    loaded: LoadedModel
    engine: Engine
    offered: Offered
    notes: list[str]

    @property
    def requests(self) -> list[LoadRequest]:
        """What to offer, arrivals in seconds from the start of the load."""
        return self.offered.windows[0]


@contextmanager
def prepare_load(
    knobs: Mapping[str, Any],
    traffic: TrafficOptions,
    *,
    slo: str,
    say: Callable[[str], None] = lambda _: None,
    stop: threading.Event | None = None,
) -> Iterator[PreparedLoad]:
    """Load the model, find the rate if it is to be measured, and cut the window.

    Afterwards the processes of the model's ranks are ended.

    Args:
        knobs: those that differ from the engine's defaults.
        traffic: the workload; `duration_s` must be set.
        slo: as a user writes it.
        say: told what is going on, for a progress line.
        stop: set it to give up.

    Raises:
        BadInput: bad traffic or SLO.
        Interrupted: `stop` was set.
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
    try:
        engine = loaded.engine(base)
        notes = list(loaded.notes)
        warm = source.burst(WARMUP_REQUESTS)
        run_load(engine, warm, drain_limit=CALIBRATION_LIMIT_S, stop=stop)
        _go_on_unless(stop)
        rate = traffic.rate
        if traffic.rate_is_measured:
            say("calibrating: all requests at once")
            rate, note = offered_rate(traffic, _sustained(engine, source, base, parsed, stop))
            notes.append(note)
        assert traffic.duration_s is not None
        offered = source.windows(rate, traffic.duration_s, count=1)
        notes += offered.notes
        engine.clear_prefix_cache()
        _go_on_unless(stop)
        yield PreparedLoad(base, parsed, model, loaded, engine, offered, notes)
    finally:
        loaded.close()


def _sustained(
    engine: Engine,
    source: Traffic,
    config: EngineConfig,
    slo: Slo,
    stop: threading.Event | None,
) -> float:
    """Requests per second that the engine finishes when all come at once."""
    burst = measure(
        engine,
        at_rate(source.burst(CALIBRATION_REQUESTS), None),
        slo=slo,
        config=config,
        drain_limit=CALIBRATION_LIMIT_S,
        seed=config.seed,
        stop=stop,
    )
    _go_on_unless(stop)
    sustained = sustained_rate(burst.records, burst.metrics["duration_s"])
    if not sustained:
        raise BadInput(
            f"no request of the calibration finished within {CALIBRATION_LIMIT_S:.0f} s: give "
            "--rate, shorter lengths (--scale-lengths) or a smaller model"
        )
    return sustained


def _go_on_unless(stop: threading.Event | None) -> None:
    if stop is not None and stop.is_set():
        raise Interrupted("Interrupted before anything was measured.")
