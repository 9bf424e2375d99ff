"""A workload on the engine, profiled and diagnosed: what `autotune profile` calls."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from autotune.errors import AutotuneError, Interrupted
from autotune.hardware.detect import describe_hardware
from autotune.hardware.versions import library_versions
from autotune.load.open_loop import LoadProgress
from autotune.measure import Measurement, measure
from autotune.model_info import with_default_model
from autotune.output_folder import claim_output
from autotune.prepared_load import PreparedLoad, prepare_load
from autotune.profile_outcome import (
    TRACE_NAME,
    ProfileOutcome,
    concluded,
    keep_load,
    keep_outcome,
)
from autotune.profiling.build import build_profile
from autotune.profiling.evidence import LoadEvidence, prompts_of, synthetic_prompts
from autotune.profiling.gpu_sampler import GpuSampler, visible_uuids
from autotune.profiling.machine import MachineCalibration, calibrate_machine
from autotune.profiling.metrics_profile import sample_metrics
from autotune.profiling.model_facts import model_facts
from autotune.profiling.schema import ModelFacts, Source
from autotune.profiling.torch_trace import trace_load
from autotune.profiling.trace_steps import TraceSteps
from autotune.records import RunFolder, utc_now
from autotune.search.methods_offered import offer_for
from autotune.slo import parse_slo
from autotune.traffic_options import TrafficOptions
from engine.config import EngineConfig
from engine.errors import EnvironmentLacks
from engine.loading import LoadedModel

# Seconds that the machine and the parts of a step are measured for.
CALIBRATION_BUDGET_S = 8.0

Say = Callable[[str], None]


def profile(
    knobs: Mapping[str, Any],
    traffic: TrafficOptions,
    *,
    slo: str,
    drain_limit: float = 30.0,
    price: float | None = None,
    calibrate: bool = True,
    trace: TraceSteps | None = None,
    output: Path | None = None,
    command: Sequence[str] = (),
    say: Say = lambda _: None,
    stop: threading.Event | None = None,
) -> ProfileOutcome:
    """Offer a workload to one configuration, and tell where the time goes.

    The load is measured as `bench` measures it; what follows it (the machine's limits, the trace)
    does not disturb it.

    Args:
        knobs: those that differ from the engine's defaults.
        traffic: the workload; `duration_s` must be set.
        slo: limits that findings are weighed by.
        drain_limit: seconds after the last arrival at which unfinished requests are given up.
        price: of this machine, USD per hour.
        calibrate: measure the machine and the parts of a step; predictions need it.
        trace: steps to record on a second load, into `output`, which must then be given.
        output: folder for the profile and its records; must be new or empty.
        command: for `run.json`.
        say: told what is going on, for a progress line.
        stop: set it to end the load early and keep what was measured.

    Raises:
        BadInput: bad traffic or SLO, a folder in use, or steps to trace that the load has not.
        Interrupted: `stop` was set before the load began.
        engine.errors.EngineError: the model or the config cannot be used.
    """
    assert trace is None or output is not None
    folder = None if output is None else RunFolder(output)
    stop = stop or threading.Event()
    with claim_output(output), prepare_load(knobs, traffic, slo=slo, say=say, stop=stop) as load:
        config = load.config
        hardware = describe_hardware(config.device)
        sampler = _sampler(config)
        measurement = _measure(load, drain_limit, sampler, say, stop)
        evidence = LoadEvidence(
            measurement.records,
            measurement.steps,
            prompts_of(load.requests),
            synthetic_prompts(load.offered.description),
        )
        if folder is not None:
            keep_load(
                folder,
                evidence,
                measurement.metrics,
                command,
                model=load.model.to_json(),
                engine_config=config.to_dict(),
                workload=load.offered.description,
                slo=str(load.slo),
                price=price,
                hardware=hardware,
                versions=library_versions(),
                seeds={"seed": config.seed},
                notes=load.notes,
            )
        interrupted = stop.is_set()
        partial = []
        if interrupted:
            partial.append("the load was interrupted: what follows is of the part before that")
        facts = model_facts(config)
        machine = None
        if calibrate and not interrupted:
            machine, problem = calibrated(load.loaded, config, facts, hardware, say, stop)
            partial += problem
        traced = None
        if trace is not None and folder is not None:
            traced, problem = _trace(load, trace, folder.path / TRACE_NAME, drain_limit, say, stop)
            partial += problem
        say("reading the records")
        built = build_profile(
            evidence,
            config,
            source=Source(kind="run", where=None if output is None else str(output), trial=0),
            metrics=measurement.metrics,
            model=facts,
            hardware=hardware,
            slo=str(load.slo),
            price=price,
            machine=machine,
            gpu=None if sampler is None else sampler.result(),
            gpu_problem=None if sampler is None else sampler.problem,
            created_at=utc_now(),
            notes=load.notes,
        )
        outcome = concluded(
            built,
            partial,
            evidence=evidence,
            config=config,
            model=load.model.to_json(),
            workload=load.offered.description,
            versions=library_versions(),
            trace=traced,
            interrupted=stop.is_set(),
        )
        if folder is not None:
            keep_outcome(folder, outcome, command)
    return outcome


def profile_endpoint(
    url: str,
    window_s: float,
    *,
    knobs: Mapping[str, Any] | None = None,
    slo: str | None = None,
    price: float | None = None,
    output: Path | None = None,
    command: Sequence[str] = (),
    say: Say = lambda _: None,
    stop: threading.Event | None = None,
) -> ProfileOutcome:
    """Watch a running server's `/metrics` over a window, and diagnose it.

    Args:
        url: of vLLM, SGLang or text-generation-inference.
        window_s: seconds to watch.
        knobs: the model that it serves and how, for bytes and operations; None leaves them out.
        slo: limits that findings are weighed by.
        price: of the server, USD per hour.
        output: folder for the profile; must be new or empty.
        command: for `run.json`.
        say: told what is going on.
        stop: set it to end early and keep what was seen.

    Raises:
        BadInput: no address, no metrics page, an unknown dialect, or a folder in use.
        EnvironmentMissing: the server cannot be reached.
        engine.errors.EngineError: the model's facts cannot be read.
    """
    parsed = None if slo is None else parse_slo(slo)
    facts = None if not knobs else model_facts(EngineConfig.from_mapping(knobs))
    stop = stop or threading.Event()
    with claim_output(output):
        seen = sample_metrics(
            url, window_s, model=facts, slo=parsed, price=price, say=say, stop=stop
        )
        outcome = concluded(seen, interrupted=stop.is_set())
        if output is not None:
            keep_outcome(RunFolder(output), outcome, command)
    return outcome


def calibrated(
    loaded: LoadedModel,
    config: EngineConfig,
    model: ModelFacts,
    hardware: Mapping[str, Any],
    say: Say,
    stop: threading.Event,
) -> tuple[MachineCalibration | None, list[str]]:
    """The machine's limits and the parts of a step for every method offered here.

    None, with a sentence, where it was interrupted or there is no memory for it.
    """
    offer = offer_for(hardware, quantized=model.quantization is not None).values

    def say_unless_stopped(text: str) -> None:
        if stop.is_set():
            raise Interrupted("Interrupted.")
        say(text)

    try:
        found = calibrate_machine(
            loaded,
            config,
            model,
            list(dict.fromkeys((config.quantization, *offer["quantization"]))),
            list(dict.fromkeys((config.kv_cache_dtype, *offer["kv_cache_dtype"]))),
            budget_s=CALIBRATION_BUDGET_S,
            say=say_unless_stopped,
        )
    except Interrupted:
        return None, ["the machine's limits were not measured: it was interrupted"]
    except (EnvironmentLacks, MemoryError, torch.OutOfMemoryError) as error:
        first = (str(error).splitlines() or ["out of memory"])[0]
        return None, [f"the machine's limits were not measured: {first}"]
    return found, []


@contextmanager
def loaded_for_calibration(config: EngineConfig, say: Say) -> Iterator[LoadedModel]:
    """A model without a load, to measure the machine with.

    Raises:
        engine.errors.EngineError: it cannot be loaded.
    """
    from engine.loading import load_model

    say("loading the model")
    loaded = load_model(with_default_model(config))
    try:
        yield loaded
    finally:
        loaded.close()


def _sampler(config: EngineConfig) -> GpuSampler | None:
    if config.device != "cuda":
        return None
    return GpuSampler(visible_uuids(config.tensor_parallel_size))


def _measure(
    load: PreparedLoad,
    drain_limit: float,
    sampler: GpuSampler | None,
    say: Say,
    stop: threading.Event,
) -> Measurement:
    def progress(done: LoadProgress) -> None:
        if sampler is not None:
            sampler.begin_at(time.perf_counter() - done.elapsed)
        say(f"measuring: {done.left}/{done.total} requests")

    with contextlib.nullcontext() if sampler is None else sampler:
        return measure(
            load.engine,
            load.requests,
            slo=load.slo,
            config=load.config,
            drain_limit=drain_limit,
            seed=load.config.seed,
            on_progress=progress,
            stop=stop,
        )


def _trace(
    load: PreparedLoad,
    steps: TraceSteps,
    path: Path,
    drain_limit: float,
    say: Say,
    stop: threading.Event,
) -> tuple[Path | None, list[str]]:
    """The trace's file; if there is none, why. The profile is worth keeping without it."""
    if not stop.is_set():
        say(f"tracing: steps {steps}")
        load.engine.clear_prefix_cache()
        try:
            done = trace_load(
                load.engine, load.requests, steps, path, drain_limit=drain_limit, stop=stop
            )
        except AutotuneError as error:
            return None, [f"no trace was written: {error}"]
        if done is not None:
            return path, []
    return None, ["no trace was written: it was interrupted"]
