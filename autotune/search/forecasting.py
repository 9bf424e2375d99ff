"""What a search needs to forecast: the machine's probes, the default's records, and time."""

from __future__ import annotations

import dataclasses
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autotune.errors import Interrupted
from autotune.predict.calibration_sample import CalibrationLoad
from autotune.predict.cost_model import CostModel
from autotune.predict.draft_knowledge import DraftKnowledge
from autotune.profiling.evidence import LoadEvidence, prompts_of
from autotune.records import RunFolder, TrialRecord
from autotune.search.advised import traced
from autotune.search.beliefs import Question
from autotune.search.candidates import Demand
from autotune.search.events import Listener
from autotune.search.guide import Effort, Guide
from autotune.search.prepare import Prepared
from autotune.search.probing import Probing, share_s, why_no_probes
from autotune.search.simulated_trials import SimulatedTrials
from autotune.search.spending import Spending
from autotune.search.trial_simulator import (
    MORE_PROBES,
    TrialSimulator,
    shortened,
    tokens_of_work,
)
from autotune.search.windows import read_windows
from autotune.workload.materialise import LoadRequest
from autotune.workload.rows import mean_rate
from engine.config import EngineConfig

if TYPE_CHECKING:
    from autotune.profiling.machine import MachineCalibration

# How much a second pays for: a constant rather than a clock, so that equal trials are followed by
# equal choices. Of a load that is too long for so many simulations, the beginning is simulated.
TOKENS_PER_SECOND = 100_000
# With all requests at once batches are large, and a token takes so much less time to simulate.
AT_ONCE_TOKENS = 2.5
# On a machine that is slower than that the screening ends after so many times its share.
OVERTIME = 2.0
MOST_SECONDS = 30.0
WANTED_SIMULATIONS = 240
FEWEST_REQUESTS = 60
# Fewer simulations than these tell nothing that arithmetic does not.
FEWEST_SIMULATIONS = 40
MOST_SIMULATIONS = 900


def open_guide(
    prepared: Prepared,
    folder: RunFolder,
    probing: Probing,
    listener: Listener,
    spending: Spending,
    searched: Sequence[TrialRecord],
    note: Callable[[str], None],
    stop: threading.Event | None = None,
) -> Guide | None:
    """What chooses trials by forecast; None, with a note, where nothing can be forecast.

    `run.json` says under `forecasts` how it went, so that a resumed run does as it did.

    Raises:
        Interrupted: the search was stopped.
    """
    if prepared.options.sampler != "simulator":
        return None
    told: dict[str, Any] | None = prepared.run.get("forecasts")
    if told is not None and not told["given"]:
        return None
    began = time.monotonic()
    guide: Guide | None = None
    facts: dict[str, Any] = {}
    reason = why_no_probes(spending, searched[0], share_s(prepared)) if told is None else None
    if reason is None:
        listener.phase("forecast", spending.left(), None)
        machine = probing.machine(share_s(prepared))
        reason = "the machine's limits were not measured" if machine is None else None
        if machine is not None:
            try:
                guide, facts = _guide(prepared, folder, machine, searched, stop)
            except Interrupted:
                raise
            except ValueError as error:
                reason = str(error)
            except Exception as error:  # measuring goes on without
                reason = f"a fault of ours ({traced(folder, error)})"
    if reason is not None:
        note(f"trials are chosen without forecasts: {reason}")
    if told is None:
        prepared.run["forecasts"] = {
            "given": guide is not None,
            "reason": reason,
            "seconds": time.monotonic() - began,
            **facts,
        }
        if guide is not None:
            note(
                f"of {facts['considered']:,} configurations considered {facts['simulated']:,} were "
                "simulated; trials are the most promising and the most uncertain of them"
            )
        prepared.run["notes"] = prepared.notes
        folder.write_json(folder.run_json, prepared.run)
    return guide


def _guide(
    prepared: Prepared,
    folder: RunFolder,
    machine: MachineCalibration,
    searched: Sequence[TrialRecord],
    stop: threading.Event | None,
) -> tuple[Guide, dict[str, Any]]:
    """The guide after its first screening, and what that came to.

    Raises:
        ValueError: nothing can be fitted to the default's trial; the message says why.
    """
    options = prepared.options
    slo, objective = options.parsed_slo, options.parsed_objective
    at_once = options.traffic.rate == float("inf")
    windows = read_windows(folder)
    window = windows[0]
    capacity = objective.name == "capacity"
    loads = prepared.schedule.probes + MORE_PROBES if capacity else 1
    seconds = min(MOST_SECONDS, share_s(prepared))
    affordable = seconds * TOKENS_PER_SECOND * (AT_ONCE_TOKENS if at_once else 1.0) / loads
    most_tokens = affordable / WANTED_SIMULATIONS
    requests = shortened(window, most_tokens, FEWEST_REQUESTS)
    simulations = min(MOST_SIMULATIONS, affordable / max(1.0, tokens_of_work(requests)))
    if simulations < FEWEST_SIMULATIONS:
        raise ValueError(
            f"the budget pays for {simulations:.0f} simulated trials, and fewer than "
            f"{FEWEST_SIMULATIONS} tell nothing; a longer --budget would"
        )
    simulator = TrialSimulator(slo, objective, prepared.schedule, at_once)
    loads_read: dict[int, CalibrationLoad] = {}

    prompts = prompts_of(window)

    def fit(records: Sequence[TrialRecord], index: int) -> SimulatedTrials:
        load = shortened(windows[index], most_tokens, FEWEST_REQUESTS)
        model = _costs(prepared, folder, machine, records, loads_read, prompts)
        if capacity:
            simulator.start = _capacity_factor(window, records)
        return SimulatedTrials(model, simulator, load, slo, objective, options.seed, stop)

    question = Question(prepared.space, prepared.base, slo, objective, options.seed)
    rate = None if at_once or capacity else mean_rate([r.arrival_s for r in requests])
    guide = Guide(
        question, fit, Demand.of(requests, rate), Effort.of(simulations, OVERTIME * seconds)
    )
    if "forecasts" in prepared.run:  # an earlier process told what came of the space
        return guide, {}
    screened = guide.screened(searched)
    if not screened.points:
        raise ValueError("no configuration of the space can be simulated")
    facts = {
        "considered": screened.considered,
        "simulated": guide.simulations,
        "unknown": screened.unknown,
        "requests": len(requests),
    }
    return guide, facts


def _capacity_factor(window: Sequence[LoadRequest], records: Sequence[TrialRecord]) -> float:
    """The rate that the trials so far sustained, as a factor on the window's."""
    rate = mean_rate([request.arrival_s for request in window])
    found = [r.objective for r in records if r.objective]
    return statistics.median(found) / rate if found and rate else 1.0


def _costs(
    prepared: Prepared,
    folder: RunFolder,
    machine: MachineCalibration,
    records: Sequence[TrialRecord],
    loads: dict[int, CalibrationLoad],
    prompts: Mapping[str, tuple[int, ...]],
) -> CostModel:
    """Costs fitted to the steps of the trials so far; `loads` keeps what was read.

    `prompts` are those of the window that the search's trials are offered, by request id.
    """
    from autotune.predict.calibration import fit_calibration
    from autotune.profiling.model_facts import model_facts

    ran = [r.number for r in records if r.outcome == "ok" and r.metrics is not None]
    for record in records:
        if record.number in ran and record.number not in loads:
            loads[record.number] = CalibrationLoad(
                EngineConfig.from_mapping(record.config),
                folder.read_steps(record.number),
                folder.read_requests(record.number),
            )
    with_steps = [loads[number] for number in ran if loads[number].steps]
    if not with_steps:
        raise ValueError("the trials left no records of their steps")
    calibration = fit_calibration(
        with_steps,
        machine,
        model_facts(with_steps[0].config),
        hardware=prepared.run["hardware"],
        engine_version=str(prepared.run["versions"]["autotune"]),
    )
    searched = {r.number for r in records if r.kind == "search"}
    told = [
        (
            loads[number].config,
            LoadEvidence(
                loads[number].requests,
                loads[number].steps,
                prompts if number in searched else {},
            ),
        )
        for number in ran
    ]
    return dataclasses.replace(calibration, drafts=DraftKnowledge.of(told, guesses=True))
