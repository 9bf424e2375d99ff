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

from autotune.predict.calibration_pace import Speed, drift, speed
from autotune.predict.calibration_sample import LoadSample, Method
from autotune.predict.fit import elementwise_seconds, probed_cost
from autotune.predict.fit_lines import HOST_TERMS, CostFit, Expected, FitLines, fit_lines
from autotune.predict.residual import LARGEST_RATIO, Residual, fit_residual
from autotune.predict.robust_fit import Floats
from autotune.profiling.machine import MachineCalibration
from autotune.profiling.schema import ModelFacts

FEWEST_STEPS = 8
# Turns of fitting coefficients at given speeds, and speeds at given coefficients.
TURNS = 2
FOLDS = 4
# Of how fast workloads run, a load tells half as much as one that came so many later.
RECENT_LOADS = 8.0
# Steps of a method that errors are told by, and of all that the residual is learned from.
MOST_JUDGED = 1500
MOST_RESIDUALS = 6000
# Standard deviations of logarithms, before loads tell more: of a load's speed; of a method's own
# level; of what a workload's steps take beyond those of a sweep, where no workload was measured; of
# steps of decodes and of those with prompts, each.
SPEED_SIGMA = 0.05
KIN_LEVEL = 0.025
BESIDE = 0.04
SHAPE = 0.015


@dataclass(frozen=True, slots=True)
class MethodFit:
    """The cost of the steps of a method and cache dtype, and its cross-validated errors.

    Relative errors of single steps that it was not fitted to: `median_error`, `p90_error`. `steps`
    is 0 where the probes alone tell. `level_error` is how far its level lies off those of other
    methods, as a standard deviation of a logarithm.
    """

    fit: CostFit
    steps: int
    median_error: float
    p90_error: float
    level_error: float = 0.0


@dataclass(frozen=True, slots=True)
class LoadFits:
    """All that loads tell: fits by method, what they leave out, and how speeds differ.

    `pace` is how many times as long the steps of workloads take as the fits say. Standard
    deviations of logarithms: `drift` of a load's speed around it, `level` of the pace itself,
    `decode_error` and `prompt_error` of steps that only decode and of the others, within a load.
    `moments` are how many times as long as on their load's mean steps took, half second by half
    second.
    """

    methods: Mapping[Method, MethodFit]
    residual: Residual
    pace: float
    drift: float
    level: float
    decode_error: float
    prompt_error: float
    moments: tuple[float, ...]


@dataclass(slots=True)
class _Loads:
    """The loads of one method as lines, with the load and the stretch of time of each."""

    lines: FitLines
    owners: NDArray[np.intp]
    stretches: NDArray[np.intp]

    def at_one_speed(self, logs: Floats) -> FitLines:
        """The lines as if all loads had run at one speed; `logs` are of theirs."""
        return self.lines.slowed(np.exp(-logs[self.owners]))


def fit_loads(
    samples: Sequence[LoadSample], machine: MachineCalibration, model: ModelFacts
) -> LoadFits:
    """Fit to all loads; those of a method that was not probed are left out.

    Others are kin of the method of the first workload, or else of the first sweep.

    Raises:
        ValueError: the first method was not probed, or has fewer than `FEWEST_STEPS` steps.
    """
    loads = _by_method(samples, machine)
    first, *others = loads
    expected = Expected.of_probes(loads[first].lines, elementwise_seconds(model, machine))
    logs = np.zeros(len(samples))  # of the loads' speeds
    fit = fit_lines(loads[first].lines, expected)
    for _ in range(TURNS):
        _set_speeds(logs, loads[first], fit, samples)
        fit = fit_lines(loads[first].at_one_speed(logs), expected)
    workloads = np.array([sample.kind == "load" for sample in samples])
    methods = {first: _method_fit(loads[first], logs, workloads, fit, expected)}
    fit = methods[first].fit
    kin = Expected.of_kin(fit.coefficients)
    believed = CostFit.believed(kin, fit.coefficients)
    for method in others:
        for owner, log in _middles(loads[method], believed).items():
            logs[owner] = log
    levels = _own_levels(samples, {method: loads[method] for method in others}, logs)
    for method in others:
        each = loads[method]
        logs[np.unique(each.owners)] -= levels[method]
        fit = fit_lines(each.at_one_speed(logs), kin)
        if workloads[loads[first].owners].any() and not workloads[each.owners].any():
            fit = _with_host_of(fit, believed)
        methods[method] = _method_fit(each, logs, workloads, fit, kin, KIN_LEVEL)
    residual = _residual(loads, methods, logs)
    return _with_speeds(samples, loads, methods, residual)


def _by_method(samples: Sequence[LoadSample], machine: MachineCalibration) -> dict[Method, _Loads]:
    loads: dict[Method, _Loads] = {}
    # A sweep that was disturbed would mislead all; workloads' own loads are longer.
    ordered = sorted(samples, key=lambda sample: sample.kind != "load")
    for method in dict.fromkeys(sample.method for sample in ordered):
        try:
            probed = probed_cost(machine.probes, *method)
        except ValueError:
            if not loads:
                raise
            continue
        mine = [(i, sample) for i, sample in enumerate(samples) if sample.method == method]
        lines = FitLines.joined([sample.lines(probed) for _, sample in mine])
        count = len(lines.device)
        if count < FEWEST_STEPS:
            if not loads:
                raise ValueError(
                    f"the cost of a step needs at least {FEWEST_STEPS} steps; has {count}"
                )
            continue
        loads[method] = _Loads(
            lines,
            np.concatenate([np.full(len(sample.works), i) for i, sample in mine]),
            np.concatenate([sample.stretches() + 1000 * i for i, sample in mine]),
        )
    return loads


def _middles(each: _Loads, fit: CostFit) -> dict[int, float]:
    """Logarithm of how many times as long each load's middle step took."""
    expected = np.maximum(each.lines.expected_device(fit.coefficients), 1e-9)
    logs = np.log(np.maximum(each.lines.device, 1e-9) / expected)
    return {int(i): float(np.median(logs[each.owners == i])) for i in np.unique(each.owners)}


def _set_speeds(logs: Floats, each: _Loads, fit: CostFit, samples: Sequence[LoadSample]) -> None:
    """Speeds around the mean of workloads, or of sweeps where there are no others."""
    middles = _middles(each, fit)
    workloads = [log for i, log in middles.items() if samples[i].kind == "load"]
    told = workloads or list(middles.values())
    mean = sum(told) / len(told)
    for owner, log in middles.items():
        logs[owner] = log - mean


def _own_levels(
    samples: Sequence[LoadSample], others: Mapping[Method, _Loads], logs: Floats
) -> dict[Method, float]:
    """How far each method lies from what the first's costs say of it; the rest is speed.

    A load's `logs` are the sum of both, and of few loads nobody can tell which it is: probes
    compare methods within seconds, and machines drift within minutes.
    """
    workloads = [i for i, sample in enumerate(samples) if sample.kind == "load"]
    told = workloads or list(range(len(samples)))
    mean = float(np.mean(logs[told]))
    levels = {}
    for method, each in others.items():
        mine = np.unique(each.owners)
        share = len(mine) / (len(mine) + (SPEED_SIGMA / KIN_LEVEL) ** 2)
        levels[method] = share * (float(np.mean(logs[mine])) - mean)
    return levels


def _method_fit(
    each: _Loads,
    logs: Floats,
    workloads: NDArray[np.bool_],
    fit: CostFit,
    expected: Expected,
    level_error: float = 0.0,
) -> MethodFit:
    lines = each.at_one_speed(logs)
    errors = _errors(each, lines, expected)
    told = workloads[each.owners]
    if told.any():
        fit = _with_hosts_level(fit, lines.taken(told))
    return MethodFit(
        fit=fit,
        steps=len(each.owners),
        median_error=float(np.median(errors)),
        p90_error=float(np.quantile(errors, 0.9)),
        level_error=level_error,
    )


def _with_hosts_level(fit: CostFit, lines: FitLines) -> CostFit:
    """Coefficients of the host by which a workload's sums come out right, long tail and all."""
    expected = lines.expected_host(fit.coefficients)
    measured = np.minimum(lines.host, 2 * LARGEST_RATIO * expected)
    level = float(measured.sum() / expected.sum()) if expected.sum() > 0 else 1.0
    changed = {name: level * getattr(fit.coefficients, name) for name in HOST_TERMS}
    return dataclasses.replace(fit, coefficients=dataclasses.replace(fit.coefficients, **changed))


def _with_host_of(fit: CostFit, other: CostFit) -> CostFit:
    """With the host's part of another fit: where requests arrive the host has more to do."""
    known = {name: getattr(other.coefficients, name) for name in HOST_TERMS}
    return dataclasses.replace(fit, coefficients=dataclasses.replace(fit.coefficients, **known))


def _errors(each: _Loads, lines: FitLines, expected: Expected) -> Floats:
    """Relative errors of steps that were not fitted to: those of other stretches of time."""
    every = -(-len(each.stretches) // MOST_JUDGED)
    lines, stretches = lines.taken(_each(every, lines)), each.stretches[::every]
    folds = stretches % FOLDS
    if len(np.unique(folds)) < 2:  # one stretch: by its quarters, then
        folds = FOLDS * np.arange(len(folds)) // len(folds)
    told = []
    for fold in np.unique(folds):
        held = folds == fold
        fit = fit_lines(lines.taken(~held), expected)
        rest = lines.taken(held)
        predicted = rest.expected_device(fit.coefficients)
        told.append(np.abs(predicted / np.maximum(rest.device, 1e-9) - 1.0))
    return np.concatenate(told)


def _residual(
    loads: Mapping[Method, _Loads], methods: Mapping[Method, MethodFit], logs: Floats
) -> Residual:
    """What all fits leave out in common."""
    lines = FitLines.joined([each.lines for each in loads.values()])
    expected = [
        each.lines.expected_device(methods[method].fit.coefficients) * np.exp(logs[each.owners])
        for method, each in loads.items()
    ]
    stretches = np.concatenate([each.stretches for each in loads.values()])
    every = -(-len(stretches) // MOST_RESIDUALS)
    taken = lines.taken(_each(every, lines))
    return fit_residual(
        taken.sizes,
        taken.prompts,
        taken.device,
        np.maximum(np.concatenate(expected)[::every], 1e-9),
        stretches[::every],
    )


def _each(every: int, lines: FitLines) -> NDArray[np.intp]:
    return np.arange(0, len(lines.device), every)


def _with_speeds(
    samples: Sequence[LoadSample],
    loads: Mapping[Method, _Loads],
    methods: Mapping[Method, MethodFit],
    residual: Residual,
) -> LoadFits:
    """How fast loads ran, beside the costs that were fitted to all of them."""
    speeds: dict[int, Speed] = {}
    decodes: list[float] = []
    prompts: list[float] = []
    for method, each in loads.items():
        coefficients = methods[method].fit.coefficients
        lines = each.lines
        device = lines.expected_device(coefficients)
        device *= residual.factors(lines.sizes, lines.prompts)
        seconds = device + lines.expected_host(coefficients) + lines.communication
        for owner in map(int, np.unique(each.owners)):
            mine = each.owners == owner
            found = speed(samples[owner], lines.seconds[mine], seconds[mine])
            speeds[owner] = found
            if samples[owner].kind == "load":
                for which, logs in ((~lines.prompts, decodes), (lines.prompts, prompts)):
                    steps = mine & which
                    if steps.sum() >= FEWEST_STEPS:
                        ratio = np.median(lines.seconds[steps] / seconds[steps]) / found.middle
                        logs.append(math.log(float(ratio)))
    workloads = [i for i in sorted(speeds) if samples[i].kind == "load"]
    told = workloads or sorted(speeds)
    totals = [math.log(speeds[i].total) for i in told]
    drifting = drift(totals)
    # The machine runs next about as it ran last.
    weights = 0.5 ** (np.arange(len(totals))[::-1] / RECENT_LOADS)
    level = drifting * math.sqrt(float(np.square(weights).sum())) / float(weights.sum())
    return LoadFits(
        methods=methods,
        residual=residual,
        pace=math.exp(float(weights @ totals) / float(weights.sum())),
        drift=drifting,
        level=level if workloads else math.hypot(level, BESIDE),
        decode_error=_shape_error(decodes),
        prompt_error=_shape_error(prompts),
        moments=tuple(factor for i in workloads for factor in speeds[i].moments),
    )


def _shape_error(logs: Sequence[float]) -> float:
    """Of steps of a kind, how far they lie off within loads; `SHAPE` counts as two loads."""
    squares = 2 * SHAPE**2 + sum(log**2 for log in logs)
    return math.sqrt(squares / (2 + len(logs)))
