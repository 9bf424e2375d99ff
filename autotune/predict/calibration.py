"""What a machine was measured to take for a model's steps, and how far that may be off.

A calibration rests on loads under a few configurations (`autotune.predict.calibration_sample`) and
on probes of the parts of a step. Of any other configuration it tells the cost of steps: exactly as
fitted where its method and cache dtype were measured, from the probes and from the first method's
fit where they were not, and with uncertainty that fits either case.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from autotune.errors import BadInput
from autotune.predict.apply import NotPredictable
from autotune.predict.cache_after import Served, cache_after
from autotune.predict.calibration_fit import LoadFits, MethodFit, fit_loads
from autotune.predict.calibration_pace import played_pace
from autotune.predict.calibration_parallel import in_parallel
from autotune.predict.calibration_sample import CalibrationLoad, LoadSample, Method
from autotune.predict.cost_model import CostDraw
from autotune.predict.draft_knowledge import DraftKnowledge
from autotune.predict.fit import probed_cost
from autotune.predict.fit_lines import TERMS, CostFit, Expected
from autotune.predict.load_times import LoadTimes, times_of
from autotune.predict.residual_cost import CalibratedCost
from autotune.predict.served import served
from autotune.predict.step_cost import Coefficients, StepCost
from autotune.profiling.machine import MachineCalibration
from autotune.profiling.schema import KvCache, ModelFacts
from engine.config import EngineConfig
from engine.engine import CacheShape
from engine.graph_sizes import decode_sizes, most_sequences

# Standard deviations of logarithms. A part that was probed alone lies so far from what it takes
# within a step; the loop around the engine takes so much more or less another time.
PROBE = 0.06
GAP = 0.15
# Another release of the engine, or another machine of this kind, may be so much faster or slower.
OTHER_VERSION = 0.1
OTHER_MACHINE = 0.25
# Knobs that change what a step costs in a way that no probe measures.
_FIXED_KNOBS = ("device", "dtype", "num_threads", "cuda_graphs")
# Knobs that what a model takes does not depend on: they are asked for in all their combinations.
_LOAD_KNOBS = (
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "max_num_seqs",
    "max_num_batched_tokens",
)
# Knobs that the KV cache depends on.
_CACHE_KNOBS = (
    "quantization",
    "kv_cache_dtype",
    "block_size",
    *_LOAD_KNOBS,
    "max_model_len",
    "tensor_parallel_size",
    "speculative_method",
    "speculative_model",
)
_UNTOLD = ("auto", None)
# How much of what a method's coefficients are off by is off in the others' as well.
_SHARED = math.sqrt(0.5)


@dataclass(frozen=True)
class Calibration:
    """Implements `autotune.predict.cost_model.CostModel`; made by `fit_calibration`.

    `config` is the first that was measured, `engine_version` the release that it was measured
    with. `wider` is a standard deviation of the logarithm of all times, for what `checked` found
    to differ, and `warnings` are sentences that say so. `drafts` is what is known of speculation on
    the traffic that is asked about.
    """

    config: EngineConfig
    model: ModelFacts
    machine: MachineCalibration
    hardware: Mapping[str, Any]
    engine_version: str
    samples: tuple[LoadSample, ...]
    fits: LoadFits
    times: LoadTimes
    created_at: str = ""
    wider: float = 0.0
    warnings: tuple[str, ...] = ()
    drafts: DraftKnowledge = field(default_factory=DraftKnowledge)
    # What was asked for before; a search asks for thousands of configs of a few kinds.
    _caches: dict[tuple[Any, ...], CacheShape | None] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )
    _models: dict[tuple[Any, ...], Served | None] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )
    _draws: dict[tuple[Any, ...], CostDraw] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    @property
    def median_error(self) -> float:
        """The cross-validated relative error of a step of the first method, the middle one."""
        return next(iter(self.fits.methods.values())).median_error

    def middle(self, config: EngineConfig) -> CostDraw:
        """The likeliest cost under a config.

        Raises:
            NotPredictable: nothing is known of a knob's effect.
        """
        fit = self._fit(config)
        key = self._key(config)
        if key not in self._draws:
            cost = self._calibrated(config, fit.fit.coefficients)
            pace = played_pace(self.fits.pace, self.fits.moments)
            self._draws[key] = CostDraw(cost, self.times, pace)
        return self._with_drafts(self._draws[key], config, None)

    def draws(self, config: EngineConfig, count: int, seed: int) -> list[CostDraw]:
        """Costs drawn from what may be so, alike for the same seed whatever the config.

        Raises:
            NotPredictable: nothing is known of a knob's effect.
        """
        fit = self._fit(config)
        drawn = []
        for number in range(count):
            key = (*self._key(config), seed, number)
            if key not in self._draws:
                self._draws[key] = self._draw(config, fit, seed, number)
            drawn.append(self._with_drafts(self._draws[key], config, (seed, number)))
        return drawn

    def cache(self, config: EngineConfig) -> CacheShape | None:
        """The KV cache under a config; None if it does not hold the longest sequence."""
        key = tuple(getattr(config, name) for name in _CACHE_KNOBS)
        if key not in self._caches:
            self._caches[key] = self._cache(config)
        return self._caches[key]

    def refitted(self, loads: Sequence[CalibrationLoad]) -> Calibration:
        """The same with further loads, whatever their configs; none without steps."""
        more = tuple(LoadSample.of(load) for load in loads if load.steps)
        return dataclasses.replace(
            self, **_fitted((*self.samples, *more), self.machine, self.model)
        )

    def checked(
        self,
        engine_version: str,
        fingerprint: str | None,
        hardware: Mapping[str, Any] | None,
    ) -> Calibration:
        """The same for another release or machine: wider, with a warning for each difference.

        `hardware` is as of `autotune.hardware.detect.describe_hardware`; None where it does not
        matter what this machine is.

        Raises:
            BadInput: it is of another model.
        """
        mine = self.model.fingerprint
        if fingerprint is not None and mine is not None and fingerprint != mine:
            raise BadInput(
                f"the calibration is of another model, {self.model.name}: calibrate with the one "
                "that is asked about"
            )
        wider, warnings = self.wider, list(self.warnings)
        if engine_version != self.engine_version:
            wider = math.hypot(wider, OTHER_VERSION)
            warnings.append(
                f"the calibration is of release {self.engine_version}, this is {engine_version}: "
                "intervals are wider; --recalibrate measures again"
            )
        if hardware is not None and _machine(hardware) != _machine(self.hardware):
            wider = math.hypot(wider, OTHER_MACHINE)
            warnings.append(
                f"the calibration is of another machine, {_machine_name(self.hardware)}, this is "
                f"{_machine_name(hardware)}: intervals are wider"
            )
        return dataclasses.replace(self, wider=wider, warnings=tuple(warnings))

    def _with_drafts(
        self, draw: CostDraw, config: EngineConfig, seed: tuple[int, int] | None
    ) -> CostDraw:
        """With what is known of the config's drafts, as it may be for the seed."""
        profile = self.drafts.profile(config, draw.cost)
        if profile is not None and seed is not None:
            profile = profile.drawn(seed)
        return draw if profile is None else dataclasses.replace(draw, drafts=profile)

    @property
    def _on_gpu(self) -> bool:
        return self.hardware.get("device") == "cuda"

    def _fit(self, config: EngineConfig) -> MethodFit:
        for name in _FIXED_KNOBS:
            asked, known = getattr(config, name), getattr(self.config, name)
            if name == "cuda_graphs" and not self._on_gpu:
                continue  # nothing is captured
            if asked != known and asked not in _UNTOLD and known not in _UNTOLD:
                raise NotPredictable(f"the calibration has {name}={known}, and not {asked}")
        method = _method(config)
        found = self.fits.methods.get(method)
        if found is not None:
            return found
        self._probed(config)
        first = next(iter(self.fits.methods.values()))
        expected = Expected.of_kin(first.fit.coefficients)
        return dataclasses.replace(
            first,
            fit=CostFit.believed(expected, first.fit.coefficients),
            steps=0,
            level_error=PROBE,
        )

    def _key(self, config: EngineConfig) -> tuple[Any, ...]:
        """What costs hang on."""
        return (*_method(config), config.tensor_parallel_size, self._ladder(config))

    def _draw(self, config: EngineConfig, fit: MethodFit, seed: int, number: int) -> CostDraw:
        fits, name = self.fits, "/".join(_method(config))
        shared = np.random.default_rng((seed, number))
        # What is one method's own hangs on its name alone.
        own = np.random.default_rng((seed, number, zlib.crc32(name.encode())))
        normal = _SHARED * shared.standard_normal(len(TERMS))
        normal += math.sqrt(1 - _SHARED**2) * own.standard_normal(len(TERMS))
        speed, decode, prompt, gap, turned = shared.standard_normal(5)
        level, link = own.standard_normal(2)
        level *= fit.level_error
        cost = self._calibrated(
            config,
            fit.fit.drawn(normal),
            decode=math.exp(level + fits.decode_error * decode),
            prompt=math.exp(level + fits.prompt_error * prompt),
            link=float(link),
        )
        drifting = math.sqrt(fits.drift**2 + fits.level**2 + self.wider**2)
        between = math.exp(GAP * gap)
        times = LoadTimes(
            self.times.gap * between,
            self.times.arrival * between,
            self.times.gap_sequence * between,
        )
        place = 0.5 * (1.0 + math.erf(turned / math.sqrt(2)))
        pace = played_pace(fits.pace * math.exp(drifting * speed), fits.moments, place)
        return CostDraw(cost, times, pace)

    def _calibrated(
        self,
        config: EngineConfig,
        coefficients: Coefficients,
        *,
        decode: float = 1.0,
        prompt: float = 1.0,
        link: float = 0.0,
    ) -> CalibratedCost:
        """The cost by some coefficients; `link` is how far off collectives are, in deviations."""
        cost = in_parallel(
            dataclasses.replace(self._probed(config), coefficients=coefficients),
            self.config,
            config,
            self.model,
            self.machine.ceilings,
            on_gpu=self._on_gpu,
            error=link,
        )
        return CalibratedCost(
            cost, self.fits.residual, decode=decode, prompt=prompt, ladder=self._ladder(config)
        )

    def _probed(self, config: EngineConfig) -> StepCost:
        try:
            return probed_cost(self.machine.probes, *_method(config))
        except ValueError as error:
            raise NotPredictable(str(error)) from None

    def _ladder(self, config: EngineConfig) -> tuple[int, ...]:
        if not self._on_gpu or not config.cuda_graphs:
            return ()
        return tuple(decode_sizes(most_sequences(config)))

    def _cache(self, config: EngineConfig) -> CacheShape | None:
        base = self._served(self.config, None)
        assert base is not None
        changed = self._served(config, base)
        if changed is None:
            return None
        first = self.samples[0]
        return cache_after(
            base,
            changed,
            KvCache(blocks_total=first.blocks_total),
            on_gpu=self._on_gpu,
            gpu_bytes=self.hardware.get("memory_bytes"),
        )

    def _served(self, config: EngineConfig, base: Served | None) -> Served | None:
        """The model under a config; for configs that differ in the load alone it is read once."""
        key = tuple(getattr(config, name) for name in _CACHE_KNOBS if name not in _LOAD_KNOBS)
        if key not in self._models:
            self._models[key] = served(config, base, self.model if base is None else None)
        found = self._models[key]
        return None if found is None else dataclasses.replace(found, config=config)


def fit_calibration(
    loads: Sequence[CalibrationLoad],
    machine: MachineCalibration,
    model: ModelFacts,
    *,
    hardware: Mapping[str, Any],
    engine_version: str,
    created_at: str = "",
) -> Calibration:
    """Calibrate by loads; the first is that of the configuration that others are compared to.

    Args:
        loads: sweeps (`autotune.predict.calibration_load`) and workloads' own, under any configs
            of one model on one machine. Of how fast it runs the last ones tell most.
        machine: ceilings and probes.
        model: its facts under the first load's config.
        hardware: as of `autotune.hardware.detect.describe_hardware`.
        engine_version: the release that served.
        created_at: when.

    Raises:
        ValueError: the first load has too few steps, or its method was not probed.
    """
    samples = tuple(LoadSample.of(load) for load in loads if load.steps)
    if not samples:
        raise ValueError("a calibration needs a load with steps")
    return Calibration(
        config=samples[0].config,
        model=model,
        machine=machine,
        hardware=hardware,
        engine_version=engine_version,
        created_at=created_at,
        **_fitted(samples, machine, model),
    )


def _fitted(
    samples: tuple[LoadSample, ...], machine: MachineCalibration, model: ModelFacts
) -> dict[str, Any]:
    """What of a calibration hangs on the loads."""
    # A workload's requests are sent while steps run, a sweep's all before.
    told = [sample for sample in samples if sample.kind == "load"] or samples
    gaps = [gap for sample in told for gap in sample.gaps]
    waits = [wait for sample in told for wait in sample.waits]
    return {
        "samples": samples,
        "fits": fit_loads(samples, machine, model),
        "times": times_of(gaps, waits),
    }


def _method(config: EngineConfig) -> Method:
    return config.quantization, config.kv_cache_dtype


def _machine(hardware: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(hardware.get(name) for name in ("device", "name", "cores"))


def _machine_name(hardware: Mapping[str, Any]) -> str:
    return f"{hardware.get('name') or hardware.get('device')} with {hardware.get('cores')} cores"
