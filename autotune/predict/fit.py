"""Coefficients of a step's cost, fitted to the steps of a load.

Steps are weighted by their own time, so that errors are relative, and those that something else
delayed lose their weight (by Cauchy's function: Holland and Welsch 1977, "Robust Regression Using
Iteratively Reweighted Least-Squares"). No coefficient is below 0 (Lawson and Hanson 1974, "Solving
Least Squares Problems", ch. 23). A ridge holds each factor near what the probes say, 1: where the
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
# Relative errors up to this are those of an undisturbed step.
QUIET_ERROR = 0.05
ROUNDS = 12
# How far from 1 the factors of measured functions are expected, and how far a step from its cost
# at least; on a disturbed machine steps are farther from it, and tell less.
FACTOR_SIGMA = 0.15
STEP_SIGMA = 0.05
# Where the steps say less of a factor, something disturbed them or the probes. Above there is no
# limit: a part may be slower within a step, for want of a cache for instance.
LEAST_FACTOR = 0.5
# Steps err together, by what the form of the cost leaves out: many tell no more than so many.
INDEPENDENT_STEPS = 20
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
    row = _elementwise_seconds(model, machine)
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


def _elementwise_seconds(model: ModelFacts, machine: MachineCalibration) -> float:
    """Seconds of a row that the elementwise operations may take at most."""
    states = ELEMENTWISE_STATES * model.num_layers * model.hidden_size
    item_bytes = 4 if model.dtype == "float32" else 2
    bandwidth = machine.ceilings.working_set_bandwidth
    return ELEMENTWISE_SLACK * states * item_bytes / bandwidth


def _fitted(probed: StepCost, steps: Sequence[StepRecord], row_scale: float) -> StepCost:
    """Fit the coefficients; `row_scale` is how many seconds a row are expected at most."""
    works = [StepWork.of(step) for step in steps]
    communication = np.array([step.communication_seconds or 0.0 for step in steps])
    device = np.array([step.device_seconds for step in steps]) - communication
    host = np.array([step.host_seconds for step in steps])
    rows = np.array([work.rows for work in works], dtype=float)
    sequences = np.array([work.sequences for work in works], dtype=float)
    ones = np.ones(len(works))
    parts = [_probed_parts(probed, work) for work in works]
    features = np.column_stack([np.array(parts), rows, sequences, ones])
    overhead = _overhead_scale(device)
    prior = np.array([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    spread = np.array([*[FACTOR_SIGMA] * 4, row_scale, overhead / 4, overhead])
    least = np.array([LEAST_FACTOR] * 4 + [0.0] * 3)
    linear, head, decodes, prefills, row, sequence, base = _robust(
        features, device, prior, spread, least
    )
    plain = np.column_stack([rows, sequences, ones])
    host_spread = _overhead_scale(host) * np.array([1 / 16, 1 / 4, 1.0])
    host_row, host_sequence, host_base = _robust(plain, host, np.zeros(3), host_spread)
    communication_row, communication_base = 0.0, 0.0
    if communication.any():
        both = np.column_stack([rows, ones])
        scale = _overhead_scale(communication)
        spread = np.array([scale / 16, scale])
        communication_row, communication_base = _robust(both, communication, np.zeros(2), spread)
    return dataclasses.replace(
        probed,
        coefficients=Coefficients(
            linear=float(linear),
            head=float(head),
            decode_attention=float(decodes),
            prefill_attention=float(prefills),
            row=float(row),
            sequence=float(sequence),
            base=float(base),
            communication_row=float(communication_row),
            communication_base=float(communication_base),
            host_row=float(host_row),
            host_sequence=float(host_sequence),
            host_base=float(host_base),
        ),
    )


def _probed_parts(cost: StepCost, work: StepWork) -> tuple[float, float, float, float]:
    """Seconds by the probes of linear layers, head, attention of decodes and of prompts."""
    new = work.rows - work.decode_sequences
    return (
        cost.layers.at(work.rows),
        cost.head.at(work.sampled),
        cost.decode_attention.at(work.decode_sequences, work.decode_kv_tokens),
        cost.prefill_attention.at(work.prefill_pairs, work.prefill_kv_tokens, new),
    )


def _overhead_scale(seconds: Floats) -> float:
    """What a step may take at least, as the scale of what nothing is known of."""
    return max(float(np.quantile(seconds, 0.1)), 1e-7)


def _robust(
    features: Floats, target: Floats, prior: Floats, spread: Floats, least: Floats | float = 0.0
) -> Floats:
    """Coefficients >= `least` that bring `features @ c` relatively near `target`, c near `prior`.

    `spread` is how far from its prior a coefficient is expected.
    """
    least = np.broadcast_to(least, prior.shape)
    target = np.maximum(target, 1e-9)
    scaled = features / target[:, None]
    repeated = max(1.0, len(target) / INDEPENDENT_STEPS)
    sigma = STEP_SIGMA
    weights = np.ones(len(target))
    found = prior
    for _ in range(ROUNDS):
        ridge = np.diag(sigma / spread) * np.sqrt(repeated)
        lines = np.vstack([scaled * weights[:, None], ridge])
        wanted = np.concatenate([weights, ridge @ prior])
        found = least + nnls(lines, wanted - lines @ least)[0]
        errors = np.abs(scaled @ found - 1.0)
        sigma = max(STEP_SIGMA, 1.5 * float(np.median(errors)))  # normal errors' own, by median
        quiet = max(QUIET_ERROR, sigma)
        new = 1.0 / np.sqrt(1.0 + (errors / quiet) ** 2)
        if np.allclose(new, weights, atol=1e-3):
            break
        weights = new
    return found


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
