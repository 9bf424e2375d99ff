"""Fits the cost of steps to all loads of a calibration at once, each at the machine's speed then.

A machine runs at another speed an hour later, by some percent. Loads are therefore brought to one
speed before coefficients are fitted, so that it is not taken for a property of their steps; the
speeds themselves tell how fast workloads run, and how far the next may be off.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autotune.predict.calibration_pace import drift, speed
from autotune.predict.calibration_sample import LoadSample, Method
from autotune.predict.fit import elementwise_seconds, probed_cost
from autotune.predict.fit_lines import CostFit, Expected, FitLines, fit_lines
from autotune.predict.residual import NO_RESIDUAL, Residual, fit_residual
from autotune.predict.robust_fit import Floats
from autotune.predict.step_cost import StepCost
from autotune.profiling.machine import MachineCalibration
from autotune.profiling.schema import ModelFacts

FEWEST_STEPS = 8
# Turns of fitting coefficients at given speeds, and speeds at given coefficients.
TURNS = 3
# Stretches of time of a load: errors are cross-validated by them, as neighbours err alike.
STRETCHES = 4
FOLDS = 4
# How far workloads' steps are expected to lie from a sweep's: a standard deviation of a logarithm.
BESIDE = 0.05


@dataclass(frozen=True, slots=True)
class MethodFit:
    """The cost of the steps of a method and cache dtype, and its cross-validated errors.

    Relative errors of single steps that it was not fitted to: `median_error`, `p90_error`. How far
    whole stretches of steps are off, as standard deviations of logarithms: `decode_error` of those
    that only decode, `prompt_error` of the others. `steps` is 0 where the probes alone tell.
    `pace` is how many times as long the workload's steps take in all, and `level_error` how far
    that is off for having been measured at few moments.
    """

    fit: CostFit
    steps: int
    median_error: float
    p90_error: float
    decode_error: float
    prompt_error: float
    pace: float = 1.0
    level_error: float = 0.0


@dataclass(frozen=True, slots=True)
class LoadFits:
    """All that loads tell: fits by method, what they leave out, and how speeds differ.

    `drift` is the standard deviation of the logarithm of a load's speed, `moments` how many times
    as long as on their mean the steps of workloads took, half second by half second.
    """

    methods: Mapping[Method, MethodFit]
    residual: Residual
    drift: float
    moments: tuple[float, ...]


@dataclass(slots=True)
class _Loads:
    """The loads of one method, as lines, with the load and the stretch of time of each."""

    lines: FitLines
    owners: NDArray[np.intp]
    stretches: NDArray[np.intp]
    fit: CostFit | None = None


def fit_loads(
    samples: Sequence[LoadSample], machine: MachineCalibration, model: ModelFacts
) -> LoadFits:
    """Fit to all loads; those of a method that was not probed are left out.

    The first sample's method is the one that others are kin of.

    Raises:
        ValueError: the first method was not probed, or has fewer than `FEWEST_STEPS` steps.
    """
    loads: dict[Method, _Loads] = {}
    for method in dict.fromkeys(sample.method for sample in samples):
        try:
            probed = probed_cost(machine.probes, *method)
        except ValueError:
            if not loads:
                raise
            continue
        found = _loads_of(samples, method, probed)
        if len(found.owners) >= FEWEST_STEPS:
            loads[method] = found
        elif not loads:
            raise ValueError(
                f"the cost of a step needs at least {FEWEST_STEPS} steps; has {len(found.owners)}"
            )
    row_scale = elementwise_seconds(model, machine)
    speeds = np.ones(len(samples))
    methods: dict[Method, MethodFit] = {}
    kin: CostFit | None = None
    for method, each in loads.items():
        expected = (
            Expected.of_probes(each.lines, row_scale)
            if kin is None
            else Expected.of_kin(kin.coefficients)
        )
        for _ in range(TURNS):
            each.fit = fit_lines(each.lines.slowed(1.0 / speeds[each.owners]), expected)
            _set_speeds(speeds, each, samples)
        assert each.fit is not None
        kin = kin or each.fit
        methods[method] = _judged(each, expected, speeds)
    residual = _residual(samples, loads, speeds)
    seconds = _expected_seconds(samples, loads, residual)
    found = [speed(sample, expected) for sample, expected in zip(samples, seconds, strict=True)]
    totals = [each.total for each in found]
    drifting = drift(samples, totals, methods)
    return LoadFits(
        _paced(methods, samples, totals, drifting),
        residual,
        drifting,
        tuple(
            factor
            for sample, each in zip(samples, found, strict=True)
            if sample.kind == "load"
            for factor in each.moments
        ),
    )


def _loads_of(samples: Sequence[LoadSample], method: Method, probed: StepCost) -> _Loads:
    lines, owners, stretches = [], [], []
    for index, sample in enumerate(samples):
        if sample.method != method:
            continue
        lines.append(
            FitLines.of_works(
                probed, sample.works, sample.device, sample.host, sample.communication
            )
        )
        count = len(sample.works)
        owners += [index] * count
        stretches += [index * STRETCHES + STRETCHES * place // count for place in range(count)]
    joined = FitLines(
        np.concatenate([part.columns for part in lines]),
        np.concatenate([part.device for part in lines]),
        np.concatenate([part.host for part in lines]),
        np.concatenate([part.communication for part in lines]),
    )
    return _Loads(joined, np.array(owners), np.array(stretches))


def _set_speeds(speeds: Floats, each: _Loads, samples: Sequence[LoadSample]) -> None:
    """How many times as long each load's middle step took; 1 on the mean of sweeps, or of all."""
    assert each.fit is not None
    expected = np.maximum(each.lines.expected_device(each.fit.coefficients), 1e-9)
    logs = np.log(np.maximum(each.lines.device, 1e-9) / expected)
    owners = np.unique(each.owners)
    middles = np.array([np.median(logs[each.owners == owner]) for owner in owners])
    swept = np.array([samples[owner].kind == "sweep" for owner in owners])
    middles -= float(np.mean(middles[swept] if swept.any() else middles))
    speeds[owners] = np.exp(middles)


def _judged(each: _Loads, expected: Expected, speeds: Floats) -> MethodFit:
    """Errors of steps that were not fitted to, by stretches of time."""
    assert each.fit is not None
    lines = each.lines.slowed(1.0 / speeds[each.owners])
    predicted = np.zeros(len(each.owners))
    for fold in range(FOLDS):
        held = each.stretches % FOLDS == fold
        if not held.any() or held.all():
            continue
        fit = fit_lines(lines.taken(~held), expected)
        predicted[held] = lines.taken(held).expected_device(fit.coefficients)
    told = predicted > 0
    errors = np.abs(predicted[told] / np.maximum(lines.device[told], 1e-9) - 1.0)
    prompts = lines.columns[:, -1] > 0
    return MethodFit(
        fit=each.fit,
        steps=len(each.owners),
        median_error=float(np.median(errors)) if len(errors) else math.nan,
        p90_error=float(np.quantile(errors, 0.9)) if len(errors) else math.nan,
        decode_error=_spread_of_stretches(each, lines, predicted, told & ~prompts),
        prompt_error=_spread_of_stretches(each, lines, predicted, told & prompts),
    )


def _spread_of_stretches(
    each: _Loads, lines: FitLines, predicted: Floats, which: NDArray[np.bool_]
) -> float:
    """Deviation of the logarithm of a stretch's time from what was predicted; 0 if untold."""
    logs = []
    for stretch in np.unique(each.stretches[which]):
        steps = which & (each.stretches == stretch)
        logs.append(float(np.median(np.log(lines.device[steps] / predicted[steps]))))
    return float(np.sqrt(np.mean(np.square(logs)))) if logs else 0.0


def _residual(
    samples: Sequence[LoadSample], loads: Mapping[Method, _Loads], speeds: Floats
) -> Residual:
    """What all fits leave out in common."""
    works, ratios, blocks = [], [], []
    for each in loads.values():
        assert each.fit is not None
        expected = np.maximum(each.lines.expected_device(each.fit.coefficients), 1e-9)
        ratios.append(each.lines.device / expected / speeds[each.owners])
        blocks.append(each.stretches)
        for owner in dict.fromkeys(each.owners.tolist()):
            works += samples[owner].works
    if not works:
        return NO_RESIDUAL
    return fit_residual(works, np.concatenate(ratios), np.concatenate(blocks))


def _expected_seconds(
    samples: Sequence[LoadSample], loads: Mapping[Method, _Loads], residual: Residual
) -> list[Floats]:
    """Seconds expected of each sample's steps, in all; none where nothing is known of them."""
    seconds: list[Floats] = [np.zeros(0)] * len(samples)
    for each in loads.values():
        assert each.fit is not None
        coefficients = each.fit.coefficients
        device = each.lines.expected_device(coefficients)
        rest = each.lines.expected_host(coefficients) + each.lines.communication
        for owner in np.unique(each.owners):
            mine = each.owners == owner
            factors = np.array([residual.factor(work) for work in samples[owner].works])
            seconds[owner] = device[mine] * factors + rest[mine]
    return seconds


def _paced(
    methods: Mapping[Method, MethodFit],
    samples: Sequence[LoadSample],
    totals: Sequence[float],
    drifting: float,
) -> dict[Method, MethodFit]:
    """Each method with how fast workloads run: by its own loads, or as they do beside its sweep.

    Of few loads and sweeps the difference is mostly drift, and only the rest of it is believed.
    """
    logs: dict[tuple[Method, str], list[float]] = {}
    for sample, total in zip(samples, totals, strict=True):
        if sample.method in methods:
            logs.setdefault((sample.method, sample.kind), []).append(math.log(total))
    means = {key: sum(values) / len(values) for key, values in logs.items()}
    beside, weight = 0.0, 1.0 / BESIDE**2
    for method in methods:
        if (method, "load") in means and (method, "sweep") in means:
            counts = len(logs[method, "load"]), len(logs[method, "sweep"])
            precision = 1.0 / (drifting**2 * sum(1.0 / count for count in counts))
            beside += precision * (means[method, "load"] - means[method, "sweep"])
            weight += precision
    beside /= weight
    paced = {}
    for method, fit in methods.items():
        log, count = means.get((method, "load")), len(logs.get((method, "load"), ()))
        if log is None:
            log, count = means[method, "sweep"] + beside, len(logs[method, "sweep"])
        level = drifting / math.sqrt(count)
        paced[method] = dataclasses.replace(fit, pace=math.exp(log), level_error=level)
    return paced
