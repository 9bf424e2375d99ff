"""What the sum of parts leaves out is learned where it is there, and only there."""

from __future__ import annotations

import numpy as np
import pytest

from autotune.predict.residual import NO_RESIDUAL, Residual, fit_residual
from autotune.predict.step_cost import StepWork

COUNT = 1200


def _steps(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Sizes, which have prompts, expected seconds, blocks."""
    rng = np.random.default_rng(seed)
    prompts = rng.random(COUNT) < 0.4
    sizes = np.where(prompts, 2 ** rng.uniform(5, 10, COUNT), 2 ** rng.uniform(0, 5, COUNT))
    return sizes.round(), prompts, 1e-3 + 2e-5 * sizes, np.arange(COUNT) * 6 // COUNT


def _decodes(count: int, context: int = 100) -> StepWork:
    return StepWork(count, 0, count, count, count * context, 0, 0)


def _prompt(rows: int) -> StepWork:
    return StepWork(rows, 1, 0, 1, 0, rows, rows * rows)


def test_no_residual_is_no_factor() -> None:
    assert NO_RESIDUAL.factor(_decodes(7)) == 1.0
    assert NO_RESIDUAL.factor(_prompt(7)) == 1.0


def test_noise_is_not_learned() -> None:
    sizes, prompts, expected, blocks = _steps(1)
    noise = np.random.default_rng(2).lognormal(0, 0.1, COUNT)
    found = fit_residual(sizes, prompts, noise * expected, expected, blocks)
    for work in (_decodes(1), _decodes(9), _decodes(32), _prompt(40), _prompt(900)):
        assert found.factor(work) == pytest.approx(1.0, abs=0.03)


def test_a_bend_by_size_is_learned_for_each_kind_of_step() -> None:
    sizes, prompts, expected, blocks = _steps(3)
    noise = np.random.default_rng(4).lognormal(0, 0.05, COUNT)
    bend = np.where(prompts, 1 + 0.2 * np.log2(sizes / 32) / 5, 1 - 0.15 * np.log2(sizes) / 5)
    found = fit_residual(sizes, prompts, bend * noise * expected, expected, blocks)
    assert found.factor(_prompt(32)) == pytest.approx(1.0, abs=0.03)
    assert found.factor(_prompt(1000)) == pytest.approx(1.2, abs=0.04)
    assert found.factor(_decodes(1)) == pytest.approx(1.0, abs=0.03)
    assert found.factor(_decodes(31)) == pytest.approx(0.85, abs=0.03)
    # Of decodes it hangs on their number alone, and beyond what was seen it stays.
    assert found.factor(_decodes(8, 10)) == found.factor(_decodes(8, 5000))
    assert found.factor(_prompt(100_000)) == found.factor(_prompt(1100))
    vectorised = found.factors(sizes, prompts)
    for place in range(0, COUNT, 97):
        size = int(sizes[place])
        work = _prompt(size) if prompts[place] else _decodes(size)
        assert vectorised[place] == pytest.approx(found.factor(work))


def test_sums_come_out_right_with_a_long_tail() -> None:
    """One step in twenty takes twice as long: the middle step tells too little of the sum."""
    sizes, prompts, expected, blocks = _steps(5)
    rng = np.random.default_rng(6)
    measured = expected * np.where(rng.random(COUNT) < 0.05, 2.0, 1.0)
    found = fit_residual(sizes, prompts, measured, expected, blocks)
    told = found.factors(sizes, prompts) * expected
    assert told.sum() == pytest.approx(measured.sum(), rel=0.01)


def test_a_stall_of_a_few_steps_hardly_counts() -> None:
    sizes, prompts, expected, blocks = _steps(7)
    measured = expected.copy()
    measured[300:310] *= 100
    found = fit_residual(sizes, prompts, measured, expected, blocks)
    assert isinstance(found, Residual)
    for work in (_decodes(2), _decodes(20), _prompt(64), _prompt(512)):
        assert found.factor(work) == pytest.approx(1.0, abs=0.08)


def test_sizes_of_which_little_is_known_stay_near_the_sum() -> None:
    sizes, prompts, expected, blocks = _steps(8)
    measured = expected.copy()
    few = np.flatnonzero(prompts & (sizes > 900))[:2]
    measured[few] *= 1.5
    found = fit_residual(sizes, prompts, measured, expected, blocks)
    assert found.factor(_prompt(1000)) < 1.1
