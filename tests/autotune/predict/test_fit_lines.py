"""Coefficients come with how far they may be off, and other methods' are kin."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from autotune.predict.fit_lines import TERMS, CostFit, Expected, FitLines, columns_of, fit_lines
from autotune.predict.load_times import times_of
from autotune.predict.step_cost import Coefficients, StepCost, StepWork
from engine.config import EngineConfig
from tests.autotune.predict.calibrated_loads import TRUTH
from tests.autotune.predict.played_profile import cost

ROW_SCALE = 2e-5


def _works(count: int, seed: int, prompts: bool = True) -> list[StepWork]:
    rng = random.Random(seed)
    works = []
    for _ in range(count):
        decodes, new = rng.randint(1, 40), rng.choice([0, 0, 16, 100, 300]) if prompts else 0
        rows, seen = decodes + new, decodes * rng.randint(20, 600)
        chunks, pairs = int(new > 0), new * (new + 1) // 2
        works.append(StepWork(rows, chunks, decodes, decodes + chunks, seen, new, pairs))
    return works


def _lines(works: list[StepWork], truth: StepCost, noise: float, seed: int = 0) -> FitLines:
    rng = np.random.default_rng(seed)
    device = np.array([truth.device_seconds(work) for work in works])
    host = np.array([truth.host_seconds(work) for work in works])
    return FitLines(
        columns_of(dataclasses.replace(truth, coefficients=Coefficients()), works),
        device * rng.lognormal(0, noise, len(works)),
        host * rng.lognormal(0, noise, len(works)),
        np.zeros(len(works)),
    )


def _truth(method: str = "none") -> StepCost:
    probed = cost(EngineConfig(quantization=method))
    return dataclasses.replace(probed, coefficients=TRUTH)


def test_the_truth_lies_within_the_draws_of_a_fit() -> None:
    truth, works = _truth(), _works(400, 1)
    lines = _lines(works, truth, 0.05)
    fit = fit_lines(lines, Expected.of_probes(lines, ROW_SCALE))
    rng = np.random.default_rng(2)
    drawn = [fit.drawn(rng.standard_normal(len(TERMS))) for _ in range(200)]
    inside = 0
    others = _lines(_works(40, 3), truth, 0.0)
    told = np.array([others.expected_device(each) for each in drawn])
    low, high = np.quantile(told, (0.05, 0.95), axis=0)
    inside = np.mean((low <= others.device) & (others.device <= high))
    assert inside > 0.8
    assert np.median(high / low) < 1.2


def test_what_no_step_tells_is_as_uncertain_as_before() -> None:
    truth = _truth()
    lines = _lines(_works(400, 4, prompts=False), truth, 0.03)
    expected = Expected.of_probes(lines, ROW_SCALE)
    fit = fit_lines(lines, expected)
    deviations = np.sqrt(np.square(fit.spread).sum(axis=1))
    by_name = dict(zip(TERMS, deviations, strict=True))
    assert by_name["prefill_attention"] == pytest.approx(0.15, rel=0.05)
    assert by_name["decode_attention"] < 0.1
    assert fit.coefficients.prefill_attention == pytest.approx(1.0)


def test_draws_keep_coefficients_possible() -> None:
    spread = 5.0 * np.eye(len(TERMS))
    fit = CostFit(Coefficients(), spread)
    rng = np.random.default_rng(5)
    for _ in range(20):
        drawn = dataclasses.asdict(fit.drawn(rng.standard_normal(len(TERMS))))
        assert min(drawn.values()) >= 0
        assert drawn["linear"] >= 0.5


def test_few_steps_of_a_kin_method_are_enough() -> None:
    """Thirty noisy steps alone do not tell the parts apart; with kin they do."""
    first = _lines(_works(600, 6), _truth(), 0.03)
    kin = fit_lines(first, Expected.of_probes(first, ROW_SCALE)).coefficients
    few = _lines(_works(30, 7, prompts=False), _truth("int8"), 0.05, 8)
    alone = fit_lines(few, Expected.of_probes(few, ROW_SCALE))
    with_kin = fit_lines(few, Expected.of_kin(kin))
    others = _lines(_works(200, 9), _truth("int8"), 0.0)

    def error(fit: CostFit) -> float:
        told = others.expected_device(fit.coefficients)
        return float(np.mean(np.abs(told / others.device - 1.0)))

    assert error(with_kin) < 0.5 * error(alone)
    assert error(with_kin) < 0.03


def test_gaps_grow_with_the_sequences_whatever_hiccups_there_are() -> None:
    rng = np.random.default_rng(10)
    sequences = rng.integers(1, 60, 500)
    seconds = 1e-4 + 5e-6 * sequences + rng.exponential(1e-5, 500)
    seconds[::250] += 0.3  # two moments at which the machine did something else
    found = times_of(list(zip(sequences.tolist(), seconds.tolist(), strict=True)), [2e-4] * 5)
    assert found.gap_sequence == pytest.approx(5e-6, rel=0.1)
    assert found.gap == pytest.approx(1.1e-4, rel=0.1)
    assert found.arrival == pytest.approx(2e-4)
    few = times_of([(4, 1e-4)] * 4, [])
    assert (few.gap, few.gap_sequence, few.arrival) == (0.0, 0.0, 0.0)
