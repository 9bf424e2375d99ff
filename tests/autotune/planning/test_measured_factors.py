"""A calibration on one GPU of a kind tells more of all plans for that kind."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from autotune.embedded import TARGET
from autotune.hardware.catalogue import load_catalogue
from autotune.hardware.efficiency import efficiency_of
from autotune.planning.catalogue_cost import CatalogueCost
from autotune.planning.catalogue_model import CatalogueModel
from autotune.planning.device_rates import Guess
from autotune.planning.measured_factors import fit_factors, is_of, shape_of_facts
from autotune.planning.read_shape import read_shape
from autotune.predict.cost_model import CostModel
from autotune.predict.step_cost import StepWork
from autotune.profiling.model_facts import model_facts
from engine.config import EngineConfig
from tests.autotune.planning import known_models as models
from tests.autotune.planning.known_models import known

GPU = load_catalogue().find("h100-sxm")
SHAPE = known(models.LLAMA_3_8B)
MEASURED = EngineConfig(max_model_len=8192)


def truth(seed: int) -> Guess:
    """A GPU as it may be; nobody knows."""
    return Guess.drawn(efficiency_of(GPU), np.random.default_rng(seed))


def cost_by(guess: Guess, config: EngineConfig, shape: Any = SHAPE) -> CatalogueCost:
    return CatalogueCost(shape, config, guess.rates(GPU, "bfloat16", config.tensor_parallel_size))


def calibrated(guess: Guess, shape: Any = SHAPE) -> CatalogueModel:
    efficiency = efficiency_of(GPU)
    known_cost = cost_by(guess, MEASURED)
    factors = fit_factors(known_cost, MEASURED, SHAPE, GPU, efficiency, error=0.03, whole=0.03)
    return CatalogueModel(shape, GPU, measured=factors)


WORKS = [
    StepWork(1, 0, 1, 1, 700, 0, 0),
    StepWork(200, 0, 200, 200, 500_000, 0, 0),
    StepWork.of_prompt(1500),
]


def spread(model: CostModel, config: EngineConfig, work: StepWork) -> tuple[float, float, float]:
    def seconds(cost: Any) -> float:
        return float(cost.device_seconds(work) + cost.host_seconds(work))

    draws = [seconds(draw.cost) for draw in model.draws(config, 50, 0)]
    low, high = np.quantile(draws, (0.05, 0.95))
    return float(low), seconds(model.middle(config).cost), float(high)


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_what_was_measured_is_met(seed: int) -> None:
    hidden = truth(seed)
    model = calibrated(hidden)
    for work in WORKS:
        told = cost_by(hidden, MEASURED)
        seconds = told.device_seconds(work) + told.host_seconds(work)
        low, middle, high = spread(model, MEASURED, work)
        assert middle == pytest.approx(seconds, rel=0.05)
        assert low < seconds < high


def test_bounds_are_narrower_and_hold_the_truth_for_other_configs() -> None:
    by_sheet = CatalogueModel(SHAPE, GPU)
    others = [
        EngineConfig(max_model_len=8192, tensor_parallel_size=2),
        EngineConfig(max_model_len=8192, kv_cache_dtype="fp8"),
        EngineConfig(max_model_len=8192, quantization="fp8"),
    ]
    held, narrower, errors = [], [], []
    for seed in range(5):
        hidden = truth(100 + seed)
        model = calibrated(hidden)
        for config in others:
            for work in WORKS:
                told = cost_by(hidden, config)
                seconds = told.device_seconds(work) + told.host_seconds(work)
                low, middle, high = spread(model, config, work)
                wide = spread(by_sheet, config, work)
                held.append(low <= seconds <= high)
                narrower.append((high - low) / (wide[2] - wide[0]))
                errors.append((abs(middle / seconds - 1), abs(wide[1] / seconds - 1)))
    assert np.mean(held) >= 0.8
    assert np.median(narrower) < 0.7
    with_one, without = np.mean(errors, axis=0)
    assert with_one < 0.7 * without


def test_another_model_gains_too() -> None:
    other = known(models.QWEN2_5_7B)
    hidden = truth(7)
    work = WORKS[1]
    told = cost_by(hidden, MEASURED, other)
    seconds = told.device_seconds(work) + told.host_seconds(work)
    low, middle, high = spread(calibrated(hidden, other), MEASURED, work)
    assert middle == pytest.approx(seconds, rel=0.08)
    assert low < seconds < high


def test_a_shape_by_its_facts() -> None:
    facts = model_facts(EngineConfig(model=str(TARGET)))
    shape, rebuilt = read_shape(TARGET), shape_of_facts(facts)
    assert is_of(shape, facts)
    assert not is_of(SHAPE, facts)
    assert not is_of(dataclasses.replace(shape, intermediate_size=4096), facts)
    assert rebuilt.intermediate_size == shape.intermediate_size
    assert rebuilt.matmul_parameters == shape.matmul_parameters
    assert rebuilt.tie_word_embeddings == shape.tie_word_embeddings
    assert rebuilt.weight_bytes() == pytest.approx(shape.weight_bytes(), rel=0.01)
    mixture = facts.model_copy(update={"num_experts": 8, "experts_per_token": 2})
    experts = shape_of_facts(mixture).experts
    assert experts is not None
    assert (experts.num_experts, experts.top_k, experts.intermediate_size) == (8, 2, 512)
