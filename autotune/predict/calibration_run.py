"""Calibrates on the live engine: probes of the machine, then a sweep under each method in turn."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from autotune.errors import Interrupted
from autotune.hardware.versions import library_versions
from autotune.predict.calibration import Calibration, fit_calibration
from autotune.predict.calibration_load import MIXED_PLACE, calibration_load
from autotune.predict.calibration_sample import CalibrationLoad
from autotune.profiling.schema import ModelFacts
from autotune.records import RequestRecord, utc_now
from autotune.workload.materialise import LoadRequest
from engine.config import EngineConfig
from engine.step_record import StepRecord

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.loading import LoadedModel

BUDGET_S = 60.0
# What probes of the machine may take of it; the rest is for sweeps.
PROBES_SHARE = 0.2
DRAIN_LIMIT_S = 60.0
# Without prompts and some decodes there is nothing to fit.
_FEWEST_PARTS = 8


class EngineSource(Protocol):
    """What keeps models loaded, one for each set of weights."""

    def loaded(self, config: EngineConfig) -> LoadedModel:
        """The model with the weights of a config."""
        ...

    def engine(self, config: EngineConfig) -> Engine:
        """An idle engine with this config."""
        ...


def calibrate(
    config: EngineConfig,
    model: ModelFacts,
    engines: EngineSource,
    *,
    hardware: Mapping[str, Any],
    methods: Sequence[str] = (),
    cache_dtypes: Sequence[str] = (),
    vocab_size: int | None = None,
    budget_s: float = BUDGET_S,
    say: Callable[[str], None] = lambda _: None,
    stop: threading.Event | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Calibration:
    """Measure this machine with this model; nothing else may be running on it.

    Args:
        config: what is served; its own method is measured in any case.
        model: its facts.
        engines: loads models and keeps them.
        hardware: as of `describe_hardware`.
        methods: other values of `quantization` that will be asked about, the most important first.
        cache_dtypes: other values of `kv_cache_dtype`.
        vocab_size: token ids of prompts are below it; the model's by default.
        budget_s: seconds that all may take; what does not fit is known by the probes alone.
        say: told what is being measured.
        stop: ends it when set.
        clock: seconds.

    Raises:
        Interrupted: `stop` was set.
    """
    from autotune.profiling.machine import calibrate_machine

    end = clock() + budget_s
    machine = calibrate_machine(
        engines.loaded(config),
        config,
        model,
        list(dict.fromkeys([config.quantization, *methods])),
        list(dict.fromkeys([config.kv_cache_dtype, *cache_dtypes])),
        budget_s=PROBES_SHARE * budget_s,
        say=say,
    )
    asked = [config]
    asked += [config.replace(kv_cache_dtype=d) for d in cache_dtypes if d != config.kv_cache_dtype]
    asked += [config.replace(quantization=m) for m in methods if m != config.quantization]
    loads: list[CalibrationLoad] = []
    longest = 0.0
    for each in asked:
        begin = clock()
        if loads and begin + longest > end:
            break
        _check(stop)
        say(f"measuring steps with quantization={each.quantization}, {_cache_name(each)}")
        engine = engines.engine(each)
        parts = calibration_load(
            vocab_size or model.vocab_size,
            engine.max_model_len,
            each.max_num_seqs,
            each.seed,
            cache_tokens=_cache_tokens(engine),
        )
        load = _swept(engine, each, parts, end, stop, clock)
        if load.steps:
            loads.append(load)
        longest = max(longest, clock() - begin)
    return fit_calibration(
        loads,
        machine,
        model,
        hardware=hardware,
        engine_version=str(library_versions()["autotune"]),
        created_at=utc_now(),
    )


def _swept(
    engine: Engine,
    config: EngineConfig,
    parts: Sequence[Sequence[LoadRequest]],
    end: float,
    stop: threading.Event | None,
    clock: Callable[[], float],
) -> CalibrationLoad:
    """Offer the parts one after another; but for some, those that come after `end` are left out."""
    from autotune.load.open_loop import run_load

    records: list[RequestRecord] = []
    steps: list[StepRecord] = []
    # What runs for the first time takes longer: memory is laid out, kernels are chosen.
    for part in [parts[0], parts[MIXED_PLACE]]:
        run_load(engine, part, drain_limit=DRAIN_LIMIT_S, stop=stop)
    began = clock()
    for number, part in enumerate(parts):
        _check(stop)
        if number >= _FEWEST_PARTS and clock() > end:
            break
        engine.clear_prefix_cache()
        offset = clock() - began
        load = run_load(engine, part, drain_limit=DRAIN_LIMIT_S, stop=stop)
        records += load.records
        steps += [_later(step, offset) for step in load.steps]
    engine.clear_prefix_cache()
    return CalibrationLoad(config, steps, records, "sweep")


def _later(step: StepRecord, seconds: float) -> StepRecord:
    return dataclasses.replace(step, start=step.start + seconds)


def _check(stop: threading.Event | None) -> None:
    if stop is not None and stop.is_set():
        raise Interrupted("the calibration was stopped")


def _cache_name(config: EngineConfig) -> str:
    return f"kv_cache_dtype={config.kv_cache_dtype}"


def _cache_tokens(engine: Engine) -> int:
    return engine.pool.num_blocks * engine.config.block_size
