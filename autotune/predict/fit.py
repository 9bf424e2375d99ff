"""Coefficients of a step's cost, fitted to the steps of a load.

The fit (`autotune.predict.robust_fit`) holds each factor near what the probes say, 1: where the
steps do not tell parts apart, because there are few or all are alike, the probes decide. And no
part is believed to take much less within a step than it took alone, whatever a disturbed load says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from autotune.predict.curves import Curve, Surface
from autotune.predict.fit_lines import Expected, FitLines, fit_lines
from autotune.predict.step_cost import Coefficients, PrefillAttention, StepCost, StepWork
from autotune.profiling.enough import lacking
from autotune.profiling.machine import MachineCalibration, stand_in
from autotune.profiling.schema import (
    AttentionProbe,
    LinearProbe,
    ModelFacts,
    Probes,
    StepFit,
)
from engine.config import EngineConfig
from engine.quantize.method_table import METHODS
from engine.step_record import StepRecord

FEWEST_STEPS = 8
# Least squares of more steps tell nothing more; they are taken evenly from the load.
MOST_STEPS = 4000
HELD_OUT = 5  # every fifth step
# Hidden states that norms, residuals, rotations and the gate of a layer read and write for a token,
# and how many times longer than by the bandwidth they may take.
ELEMENTWISE_STATES = 16
ELEMENTWISE_SLACK = 4.0

Floats = NDArray[np.float64]


def fit_step_cost(
    steps: Sequence[StepRecord],
    model: ModelFacts,
    config: EngineConfig,
    machine: MachineCalibration,
) -> tuple[StepCost, StepFit]:
    """The cost of a step under `config`, and how well it tells steps that it was not fitted to.

    Raises:
        ValueError: fewer than `FEWEST_STEPS` steps, or no probe of the config's own method or
            cache.
    """
    if len(steps) < FEWEST_STEPS:
        raise ValueError(lacking("the cost of a step", "steps", FEWEST_STEPS, len(steps)))
    probed = probed_cost(machine.probes, config.quantization, config.kv_cache_dtype)
    used = _spread(steps)
    held_out = used[HELD_OUT - 1 :: HELD_OUT]
    rest = [step for place, step in enumerate(used) if place % HELD_OUT != HELD_OUT - 1]
    row = elementwise_seconds(model, machine)
    errors = _errors(_fitted(probed, rest, row), held_out)
    cost = _fitted(probed, used, row)
    return cost, StepFit(
        coefficients=dataclasses.asdict(cost.coefficients),
        median_error=float(np.median(errors)),
        p90_error=float(np.quantile(errors, 0.9)),
        steps=len(used),
    )


def step_cost(fit: StepFit, probes: Probes, config: EngineConfig) -> StepCost:
    """The cost that was fitted, from what a profile keeps of it; `config` is the profile's.

    Raises:
        ValueError: no probe of the config's own method or cache.
    """
    known = {field.name for field in dataclasses.fields(Coefficients)}
    kept = {name: value for name, value in fit.coefficients.items() if name in known}
    probed = probed_cost(probes, config.quantization, config.kv_cache_dtype)
    return dataclasses.replace(probed, coefficients=Coefficients(**kept))


def probed_cost(probes: Probes, method: str, kv_cache_dtype: str) -> StepCost:
    """The cost as the probes alone tell it.

    Raises:
        ValueError: the method or the cache dtype was not probed.
    """
    linear = linear_probe(probes, method)
    attention = attention_probe(probes, kv_cache_dtype)
    if linear is None or attention is None:
        lacking = f"quantization={method}" if linear is None else f"kv_cache_dtype={kv_cache_dtype}"
        raise ValueError(f"the probes do not have {lacking}")
    decodes = zip(attention.sequences, attention.contexts, attention.seconds, strict=True)
    return StepCost(
        layers=Curve.of(linear.rows, linear.layers_s),
        head=Curve.of(linear.rows, linear.head_s),
        decode_attention=Surface.of(decodes),
        prefill_attention=_prefill_attention(attention),
    )


def linear_probe(probes: Probes, method: str) -> LinearProbe | None:
    """The probe of a method, or of one that ends in the same kernels."""
    by_method = {probe.method: probe for probe in probes.linears}
    if method in by_method:
        return by_method[method]
    if method not in METHODS:
        return None
    alike = [name for name in by_method if stand_in(name) == stand_in(method)]
    return by_method[alike[0]] if alike else None


def attention_probe(probes: Probes, kv_cache_dtype: str) -> AttentionProbe | None:
    """The probe of a cache dtype."""
    return next((p for p in probes.attention if p.kv_cache_dtype == kv_cache_dtype), None)


def _prefill_attention(probe: AttentionProbe) -> PrefillAttention:
    """Least relative squares over the chunks that were timed."""
    points = [
        (new * context - new * (new - 1) / 2, context, new)
        for new, context in zip(probe.chunk_tokens, probe.chunk_contexts, strict=True)
    ]
    if not points:
        # A decode is a chunk of one token: its reads cost what reads of chunks do.
        longest = max(range(len(probe.seconds)), key=lambda i: probe.contexts[i])
        tokens = probe.sequences[longest] * probe.contexts[longest]
        return PrefillAttention(pair=0.0, kv_token=probe.seconds[longest] / tokens)
    seconds = np.array(probe.chunk_seconds)
    found, _ = nnls(np.array(points) / seconds[:, None], np.ones(len(seconds)))
    return PrefillAttention(*(float(value) for value in found))


def elementwise_seconds(model: ModelFacts, machine: MachineCalibration) -> float:
    """Seconds of a row that the elementwise operations may take at most."""
    states = ELEMENTWISE_STATES * model.num_layers * model.hidden_size
    item_bytes = 4 if model.dtype == "float32" else 2
    bandwidth = machine.ceilings.working_set_bandwidth
    return ELEMENTWISE_SLACK * states * item_bytes / bandwidth


def _fitted(probed: StepCost, steps: Sequence[StepRecord], row_scale: float) -> StepCost:
    """Fit the coefficients; `row_scale` is how many seconds a row are expected at most."""
    lines = FitLines.of(probed, steps)
    fit = fit_lines(lines, Expected.of_probes(lines, row_scale))
    return dataclasses.replace(probed, coefficients=fit.coefficients)


def _spread(steps: Sequence[StepRecord]) -> list[StepRecord]:
    """At most `MOST_STEPS` steps, evenly from all."""
    if len(steps) <= MOST_STEPS:
        return list(steps)
    places = np.linspace(0, len(steps) - 1, MOST_STEPS).round().astype(int)
    return [steps[place] for place in places]


def _errors(cost: StepCost, steps: Sequence[StepRecord]) -> Floats:
    predicted = np.array([cost.device_seconds(StepWork.of(step)) for step in steps])
    measured = np.maximum([step.device_seconds for step in steps], 1e-9)
    return np.asarray(np.abs(predicted / measured - 1.0), dtype=float)
