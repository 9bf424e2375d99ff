"""Calibrations that price verification, and foretell what speculation is worth."""

from __future__ import annotations

import dataclasses
import random
import statistics

import pytest

from autotune.predict.calibration import Calibration
from autotune.predict.calibration_sample import CalibrationLoad
from autotune.predict.draft_knowledge import DraftKnowledge
from autotune.predict.drafting import DraftCost, DraftProfile, UnknownDrafts
from autotune.predict.replay import Replayed, replay
from autotune.predict.step_cost import StepWork
from autotune.profiling.evidence import LoadEvidence
from autotune.simulation.play import play
from autotune.simulation.speedup import predicted_speedup
from autotune.workload.materialise import LoadRequest
from engine.config import EngineConfig
from engine.engine import CacheShape
from tests.autotune.predict.calibrated_loads import (
    BLOCKS,
    CONFIG,
    MODEL,
    TIMES,
    calibrated,
    loaded,
    swept,
    true_cost,
)

NGRAM = CONFIG.replace(
    speculative_method="ngram", num_speculative_tokens=4, speculative_adaptive=False
)
DRAFTS = DraftProfile((0.8, 0.7, 0.6), share=0.6, run=4.0, cost=DraftCost(1e-4, 4e-5))
SHAPE = CacheShape(BLOCKS, MODEL.max_model_len)


def requests(count: int, rate: float | None, seed: int = 5) -> list[LoadRequest]:
    rng = random.Random(seed)
    found, now = [], 0.0
    for number in range(count):
        now += rng.expovariate(rate) if rate else 0.0
        prompt = tuple(rng.randrange(4096) for _ in range(rng.randint(20, 200)))
        found.append(LoadRequest(f"{number}", now, prompt, rng.randint(20, 120)))
    return found


def truth(
    config: EngineConfig, load: list[LoadRequest], drafts: DraftProfile | None, seed: int = 1
) -> Replayed:
    """What the true machine measures."""
    return replay(
        load,
        config,
        true_cost(config, noise=random.Random(seed)),
        SHAPE,
        drain_limit=600.0,
        times=TIMES,
        drafts=drafts,
        keep_steps=True,
        seed=seed,
    )


def tpot(played: Replayed) -> float:
    return statistics.fmean(
        (r.token_times[-1] - r.token_times[0]) / (r.output_tokens - 1) for r in played.records
    )


@pytest.fixture(scope="module")
def drafted() -> Replayed:
    return truth(NGRAM, requests(60, 3.0), DRAFTS)


@pytest.fixture(scope="module")
def plainly() -> Calibration:
    """From loads without drafts."""
    return calibrated(swept(CONFIG), loaded(CONFIG))


def test_verification_is_priced_as_it_was_never_measured(plainly: Calibration) -> None:
    """Rows of linear layers are probed; drafts need not be among them."""
    cost, true = plainly.middle(CONFIG).cost, true_cost(CONFIG, sigma=0.0)
    for sequences in (1, 4, 16):
        for depth in (1, 4, 8):
            work = StepWork.of_decodes(sequences, 200 * sequences, depth * sequences)
            assert cost.device_seconds(work) == pytest.approx(true.device_seconds(work), rel=0.08)


def test_loads_that_drafted_are_fitted_like_others(drafted: Replayed) -> None:
    """What drafting takes is not taken for the host's."""
    slow = dataclasses.replace(DRAFTS, cost=DraftCost(base=0.02))
    with_slow_drafts = truth(NGRAM, requests(60, 3.0), slow)
    host = []
    for played in (drafted, with_slow_drafts):
        load = CalibrationLoad(NGRAM, played.steps, played.records)
        cost = calibrated(swept(CONFIG), load).middle(NGRAM).cost
        work = StepWork.of_decodes(4, 800, 8)
        true = true_cost(CONFIG, sigma=0.0)
        assert cost.device_seconds(work) == pytest.approx(true.device_seconds(work), rel=0.08)
        host.append(cost.host_seconds(work))
        assert host[-1] == pytest.approx(true.host_seconds(work), rel=0.25)


@pytest.mark.parametrize("rate", [0.5, 4.0])
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_speed_up_is_foretold(
    rate: float, adaptive: bool, drafted: Replayed, plainly: Calibration
) -> None:
    """From plain loads, and from drafts that were measured at another load."""
    drafting = NGRAM.replace(speculative_adaptive=adaptive)
    evidence = LoadEvidence(drafted.records, drafted.steps)
    model = dataclasses.replace(plainly, drafts=DraftKnowledge.of([(NGRAM, evidence)]))
    load = requests(40, rate, seed=9)
    measured = tpot(truth(CONFIG, load, None)) / tpot(truth(drafting, load, DRAFTS, seed=3))
    foretold = predicted_speedup(load, CONFIG, drafting, model, draws=8)
    assert measured > 1.1
    assert foretold.value == pytest.approx(measured, rel=0.1)
    assert foretold.low < measured * 1.05
    assert foretold.high > measured * 0.95
    assert foretold.low < foretold.value < foretold.high
    # What draws do not know of comes on top.
    wider = predicted_speedup(load, CONFIG, drafting, model, draws=8, noise=0.1)
    assert wider.value == foretold.value
    assert wider.low < min(foretold.low, 0.86 * wider.value)
    assert wider.high > max(foretold.high, 1.17 * wider.value)


def test_all_at_once_speculation_is_worth_less(plainly: Calibration) -> None:
    model = plainly
    load = requests(60, None)
    deep = NGRAM.replace(num_speculative_tokens=8)
    poor = DraftProfile((0.3,), cost=DraftCost(1e-4, 4e-5))
    gain = predicted_speedup(load, CONFIG, deep, model, poor, metric="throughput", draws=4)
    assert gain.high < 0.9
    adaptive = deep.replace(speculative_adaptive=True)
    gain = predicted_speedup(load, CONFIG, adaptive, model, poor, metric="throughput", draws=4)
    assert gain.low > 0.95


def test_draws_know_of_drafts_and_are_alike_for_a_seed(
    drafted: Replayed, plainly: Calibration
) -> None:
    evidence = LoadEvidence(drafted.records, drafted.steps)
    model = dataclasses.replace(plainly, drafts=DraftKnowledge.of([(NGRAM, evidence)]))
    assert model.middle(CONFIG).drafts is None
    assert all(draw.drafts is None for draw in model.draws(CONFIG, 3, 0))
    middle = model.middle(NGRAM).drafts
    assert middle is not None
    first, again = (model.draws(NGRAM, 5, 0) for _ in range(2))
    assert [d.drafts for d in first] == [d.drafts for d in again]
    assert len({d.drafts.acceptance for d in first if d.drafts is not None}) == 5
    assert [d.cost for d in first] == [d.cost for d in model.draws(CONFIG, 5, 0)]
    with pytest.raises(UnknownDrafts):
        play(requests(3, None), NGRAM, plainly.middle(NGRAM), SHAPE, drain_limit=9.0)


def test_a_model_that_drafts_takes_its_part_of_the_cache(plainly: Calibration) -> None:
    """The model as its own draft: tokens take twice the bytes."""
    model = plainly
    small = {"kv_cache_memory_bytes": 64 << 20}
    plain = model.cache(CONFIG.replace(**small))
    both = model.cache(
        CONFIG.replace(**small, speculative_method="draft_model", speculative_model=CONFIG.model)
    )
    assert plain is not None
    assert both is not None
    assert both.num_blocks == plain.num_blocks // 2
    lookup = model.cache(CONFIG.replace(**small, speculative_method="ngram"))
    assert lookup == plain
