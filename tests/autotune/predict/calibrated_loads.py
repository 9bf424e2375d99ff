"""Loads of a machine whose true costs are known: noise, drift, and what the form leaves out."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, field
from typing import Any

from autotune.model_info import with_default_model
from autotune.predict.calibration import Calibration, fit_calibration
from autotune.predict.calibration_load import calibration_load
from autotune.predict.calibration_sample import CalibrationLoad, Kind
from autotune.predict.load_times import LoadTimes
from autotune.predict.replay import Replayed, replay
from autotune.predict.step_cost import Coefficients, StepCost, StepWork
from autotune.predict.step_times import DecodeLine
from autotune.profiling.machine import MachineCalibration
from autotune.profiling.model_facts import model_facts
from autotune.profiling.schema import Ceilings
from autotune.workload.materialise import LoadRequest
from engine.config import EngineConfig
from engine.engine import CacheShape
from tests.autotune.predict.played_profile import cost, probes, requests

BLOCKS = 4096
CONFIG = with_default_model(EngineConfig(device="cpu", max_num_seqs=32))
MODEL = model_facts(CONFIG)
MACHINE = MachineCalibration(
    Ceilings(
        bandwidth=4e10,
        working_set_bandwidth=6e10,
        matmul={"bfloat16": 2e12},
        compute_dtype="bfloat16",
        ridge=2e12 / 6e10,
    ),
    probes(),
)
HARDWARE = {"device": "cpu", "name": "test", "cores": 2, "memory_bytes": 1 << 34}
TIMES = LoadTimes(gap=2e-4, arrival=5e-4, gap_sequence=1e-5)
TRUTH = Coefficients(
    linear=1.08,
    head=1.0,
    decode_attention=1.1,
    prefill_attention=1.0,
    sequence=1e-5,
    base=8e-4,
    chunk=4e-4,
    host_sequence=1e-5,
    host_base=3e-4,
    host_chunk=1e-4,
    verify=3e-4,
    host_verify=2e-4,
)


@dataclass
class TrueCost:
    """What steps take: the sum, a bend that it has not, and noise."""

    sum: StepCost
    speed: float = 1.0
    bend: float = 0.0
    noise: random.Random = field(default_factory=lambda: random.Random(0))
    sigma: float = 0.03

    def device_seconds(self, work: StepWork) -> float:
        bent = 1.0 + self.bend * (work.prefill_sequences > 0 and 48 <= work.rows <= 256)
        noise = self.noise.lognormvariate(0.0, self.sigma) if self.sigma else 1.0
        return self.speed * bent * noise * self.sum.device_seconds(work)

    def host_seconds(self, work: StepWork) -> float:
        return self.speed * self.sum.host_seconds(work)

    def decode_line(self, sequences: int) -> DecodeLine | None:
        return None


def true_cost(config: EngineConfig, **rest: Any) -> TrueCost:
    return TrueCost(dataclasses.replace(cost(config), coefficients=TRUTH), **rest)


def played(
    load: list[LoadRequest], config: EngineConfig, truth: TrueCost, keep_steps: bool = True
) -> Replayed:
    """What a load measures on the true machine."""
    shape = CacheShape(BLOCKS, MODEL.max_model_len)
    return replay(load, config, truth, shape, drain_limit=600.0, times=TIMES, keep_steps=keep_steps)


def swept(config: EngineConfig, **truth: Any) -> CalibrationLoad:
    """A sweep."""
    steps, cost_now = [], true_cost(config, **truth)
    for part in calibration_load(4096, MODEL.max_model_len, config.max_num_seqs):
        steps += played(part, config, cost_now).steps
    return CalibrationLoad(config, steps, kind="sweep")


def loaded(
    config: EngineConfig, rate: float = 3.0, kind: Kind = "load", **truth: Any
) -> CalibrationLoad:
    """A workload's own load; the sender's lateness is in the records."""
    result = played(requests(120, rate), config, true_cost(config, **truth))
    return CalibrationLoad(config, result.steps, result.records, kind)


def calibrated(*loads: CalibrationLoad) -> Calibration:
    return fit_calibration(
        loads, MACHINE, MODEL, hardware=HARDWARE, engine_version="1.0", created_at="2026-01-01"
    )
