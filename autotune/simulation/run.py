"""A simulation from what a user asked for: what `autotune simulate` calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotune.calibration import CALIBRATION_LIMIT_S, CALIBRATION_REQUESTS, sustained_rate
from autotune.errors import BadInput, Interrupted
from autotune.hardware.versions import library_versions
from autotune.predict.apply import NotPredictable
from autotune.predict.drafting import DraftProfile, UnknownDrafts
from autotune.records import SCHEMA_VERSION, RunFolder, utc_now
from autotune.simulation.cost_source import CostSource, cost_source
from autotune.simulation.fleet import Fleet
from autotune.simulation.options import SimulateOptions
from autotune.simulation.play import play
from autotune.simulation.simulate import Simulated, simulate
from autotune.slo import Slo, parse_slo
from autotune.traffic import Traffic, load_traffic
from autotune.traffic_options import DEFAULT_LOAD_FACTOR, TrafficOptions
from autotune.workload.materialise import LoadRequest
from engine.config import EngineConfig

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class SimulateOutcome:
    """What was simulated, of what, and what came out; `costs` says where the steps' costs are from.

    `notes` are on the traffic, the costs and the SLO.
    """

    config: EngineConfig
    model: dict[str, Any]
    workload: dict[str, Any]
    slo: str
    fleet: Fleet
    simulated: Simulated
    costs: dict[str, Any]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """By the keys of `simulate --json`."""
        split = self.fleet.disaggregation
        return {
            **self.simulated.to_json(),
            "fleet": {
                "engines": self.fleet.engines,
                "router": self.fleet.router,
                "prefill_replicas": None if split is None else split.prefill_replicas,
                "decode_replicas": None if split is None else split.decode_replicas,
            },
            "costs": self.costs,
            "notes": self.notes,
        }


def run_simulation(
    options: SimulateOptions, *, say: Say = lambda _: None, stop: threading.Event | None = None
) -> SimulateOutcome:
    """Simulate a configuration under a workload.

    Args:
        options: what was asked for; the traffic's `duration_s` must be set.
        say: told what is going on, for a progress line.
        stop: set it to give up.

    Raises:
        BadInput: bad traffic, SLO, fleet or calibration, or a knob whose effect nobody knows.
        Interrupted: `stop` was set.
        engine.errors.EngineError: the model or the config cannot be used.
    """
    stop = stop or threading.Event()
    slo = parse_slo(options.slo)
    source = cost_source(options, say, stop)
    fleet = options.fleet(source.kv_bytes_per_token)
    try:
        return _simulated(options, source, fleet, options.drafts, slo, say, stop)
    except UnknownDrafts as error:
        raise BadInput(
            f"this cannot be simulated: {error}; tell the chances of their tokens by "
            "--speculative-acceptance, or name the folder of a profile or a run whose trials "
            "tell them by --calibration"
        ) from error
    except NotPredictable as error:
        remedy = (
            "name a calibration that measured it"
            if options.calibration is not None
            else "--recalibrate measures this configuration, if this machine serves it"
        )
        raise BadInput(f"this cannot be simulated: {error}; {remedy}") from error


def save(outcome: SimulateOutcome, path: Path, command: Sequence[str]) -> None:
    """Write `run.json` and `simulation.json` into the folder."""
    folder = RunFolder(path)
    folder.write_json(path / "simulation.json", outcome.to_json())
    folder.write_json(
        folder.run_json,
        {
            "schema_version": SCHEMA_VERSION,
            "kind": "simulate",
            "command": list(command),
            "started_at": utc_now(),
            "status": "done",
            "model": outcome.model,
            "engine_config": outcome.config.to_dict(),
            "workload": outcome.workload,
            "slo": outcome.slo,
            "versions": library_versions(),
            "notes": outcome.notes,
        },
    )


def _simulated(
    options: SimulateOptions,
    source: CostSource,
    fleet: Fleet,
    drafts: DraftProfile | None,
    slo: Slo,
    say: Say,
    stop: threading.Event,
) -> SimulateOutcome:
    config, traffic = source.config, options.traffic
    notes = list(source.notes)
    say("drawing the requests")
    offered = load_traffic(traffic, source.info, config, options.seed)
    rate = traffic.rate
    if traffic.rate_is_measured:
        say("finding the rate that is sustained")
        rate, note = _rate(traffic, source, offered, fleet, drafts, options.seed)
        notes.append(note)
    assert traffic.duration_s is not None
    # A preset is drawn anew for each play, as its arrivals are a matter of chance; the first is
    # what `bench` would offer. A trace is what it is.
    count = 1 + options.draws if traffic.is_preset else 1
    load = offered.windows(rate, traffic.duration_s, count)
    notes += load.notes
    requests: Sequence[LoadRequest] | Callable[[int], Sequence[LoadRequest]]
    requests = load.windows.__getitem__ if traffic.is_preset else load.windows[0]

    def before_play(number: int, total: int) -> None:
        if stop.is_set():
            raise Interrupted("Interrupted before the simulation was done.")
        say(f"simulating: {number}/{total}")

    simulated = simulate(
        source.model,
        config,
        requests,
        slo=slo,
        fleet=fleet,
        drafts=drafts,
        draws=options.draws,
        seed=options.seed,
        drain_limit=options.drain_limit,
        before_play=before_play,
    )
    return SimulateOutcome(
        config=config,
        model=source.info.to_json(),
        workload=load.description,
        slo=str(slo),
        fleet=fleet,
        simulated=simulated,
        costs=source.told,
        notes=[*notes, *simulated.notes],
    )


def _rate(
    traffic: TrafficOptions,
    source: CostSource,
    offered: Traffic,
    fleet: Fleet,
    drafts: DraftProfile | None,
    seed: int,
) -> tuple[float, str]:
    """The rate to offer, and a note on it: what `bench` measures for it is simulated here."""
    cache = source.cache()
    burst = offered.burst(CALIBRATION_REQUESTS * fleet.engines)
    played = play(
        burst,
        source.config,
        source.model.middle(source.config),
        cache,
        drain_limit=CALIBRATION_LIMIT_S,
        fleet=fleet,
        drafts=drafts,
        seed=seed,
    )
    sustained = sustained_rate(played.records, played.duration)
    if not sustained:
        raise BadInput(
            f"simulated, no request finishes within {CALIBRATION_LIMIT_S:.0f} s when all come at "
            "once: give --rate, or shorter lengths (--scale-lengths)"
        )
    factor = traffic.load_factor or DEFAULT_LOAD_FACTOR
    rate = factor * sustained
    return rate, (
        f"offered rate {rate:.3g} requests/s: {factor:g} times the {sustained:.3g} that are "
        "sustained when simulated with all requests at once"
    )
