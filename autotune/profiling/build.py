"""From a load's records to its profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autotune.profiling.breakdown import Timeline, breakdowns
from autotune.profiling.communication import communication
from autotune.profiling.counted_cost import CostOfSteps, CountedCost
from autotune.profiling.evidence import LoadEvidence
from autotune.profiling.host import host
from autotune.profiling.imbalance import imbalance
from autotune.profiling.kv_cache import kv_cache
from autotune.profiling.phases import phases
from autotune.profiling.queueing import queueing
from autotune.profiling.schema import Gpu, ModelFacts, Profile, Source, StepFit
from autotune.profiling.series import series
from autotune.profiling.speculation_dry_run import speculation
from autotune.profiling.speculation_measured import measured_speculation
from autotune.profiling.step_columns import StepColumns
from autotune.profiling.traffic import traffic
from engine.config import EngineConfig

if TYPE_CHECKING:
    from autotune.profiling.machine import MachineCalibration


def build_profile(
    evidence: LoadEvidence,
    config: EngineConfig,
    *,
    source: Source,
    metrics: Mapping[str, Any] | None,
    model: ModelFacts | None,
    hardware: Mapping[str, Any] | None = None,
    slo: object | None = None,
    price: float | None = None,
    machine: MachineCalibration | None = None,
    gpu: Gpu | None = None,
    gpu_problem: str | None = None,
    created_at: str,
    notes: Sequence[str] = (),
) -> Profile:
    """Compute everything that a profile says of one load.

    What the evidence does not allow is None, and `partial` says why; nothing is estimated beyond
    it.

    Args:
        evidence: records and prompts of the load.
        config: the engine's.
        source: where the evidence comes from.
        metrics: of the same load, by the keys of `bench --json`.
        model: None where it is unknown; operations and bytes then are too.
        hardware: what `describe_hardware` says.
        slo: its text, or what prints as it.
        price: of an hour of the hardware.
        machine: measured ceilings and probes; without them no utilisation is known.
        gpu: samples taken during the load.
        gpu_problem: why there are none, where they were wanted.
        created_at: `autotune.records.utc_now()`.
        notes: sentences for the reader that are no lack.
    """
    steps = StepColumns.of(evidence.steps)
    partial: list[str] = []

    def kept(found: tuple[Any, list[str]]) -> Any:
        partial.extend(found[1])
        return found[0]

    cost, fit = kept(_cost(evidence, steps, config, model, machine))
    error = None if fit is None else fit.median_error
    arrived = kept(traffic(evidence, _duration(evidence, steps, metrics)))
    cache = kept(kv_cache(evidence, steps, config, model))
    devices = config.tensor_parallel_size if _on_gpu(hardware) else 1
    found_phases = kept(phases(steps, model, machine.ceilings if machine else None, devices))
    if gpu is None and (gpu_problem is not None or _on_gpu(hardware)):
        why = "" if gpu_problem is None else f": {gpu_problem}"
        partial.append(f"power, clocks and memory of the GPU were not sampled{why}")
    times = []
    if cost is not None:
        timeline = Timeline(evidence.steps, steps, cost)
        times = kept(breakdowns(evidence.requests, timeline, cache.recomputed_share))
    return Profile(
        created_at=created_at,
        source=source,
        engine_config=config.to_dict(),
        hardware=None if hardware is None else dict(hardware),
        slo=None if slo is None else str(slo),
        price=price,
        model=model,
        ceilings=machine.ceilings if machine else None,
        traffic=arrived,
        metrics=None if metrics is None else dict(metrics),
        phases=found_phases,
        kv=cache,
        queueing=kept(queueing(evidence, steps, config, cost)),
        host=host(steps),
        communication=kept(communication(steps, config.tensor_parallel_size)),
        imbalance=imbalance(steps),
        speculation=kept(speculation(evidence, config, steps, cost, error)),
        measured_speculation=kept(measured_speculation(evidence, config, cost, error)),
        breakdowns=times,
        step_fit=fit,
        probes=machine.probes if machine else None,
        gpu=gpu,
        series=series(steps),
        partial=partial,
        notes=list(notes),
    )


def _cost(
    evidence: LoadEvidence,
    steps: StepColumns,
    config: EngineConfig,
    model: ModelFacts | None,
    machine: MachineCalibration | None,
) -> tuple[tuple[CostOfSteps | None, StepFit | None], list[str]]:
    """What explains the steps' time: the probes fitted to it, or else its records alone."""
    if not len(steps):
        return (None, None), ["no step was recorded: nothing is known of the engine's time"]
    if machine is None or model is None:
        lack = "this machine was not calibrated" if machine is None else "the model is unknown"
        return (CountedCost.fit(steps), None), [
            f"{lack}: shares of the ceilings are unknown, and of a decode step's time the reading "
            "of weights is not told from its other fixed costs"
        ]
    from autotune.predict.fit import fit_step_cost

    try:
        return fit_step_cost(evidence.steps, model, config, machine), []
    except ValueError as error:
        return (CountedCost.fit(steps), None), [str(error)]


def _duration(
    evidence: LoadEvidence, steps: StepColumns, metrics: Mapping[str, Any] | None
) -> float:
    """Seconds of the load: as measured, or until the last that was recorded of it."""
    measured = None if metrics is None else metrics.get("duration_s")
    if measured is not None:
        return float(measured)
    ends = [r.token_times[-1] if r.token_times else r.send for r in evidence.requests]
    return max([*ends, float(steps.end[-1]) if len(steps) else 0.0])


def _on_gpu(hardware: Mapping[str, Any] | None) -> bool:
    return hardware is not None and hardware.get("device") == "cuda"
