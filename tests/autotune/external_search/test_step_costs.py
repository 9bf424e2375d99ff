from __future__ import annotations

import numpy as np
import pytest

from autotune.external_search.step_costs import LinearCost, fit_cost
from autotune.predict.replay import replay
from autotune.records import RequestRecord
from autotune.workload.materialise import LoadRequest
from engine.config import EngineConfig
from engine.engine import CacheShape


def load(rate: float, seed: int) -> list[LoadRequest]:
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / rate, 150))
    return [
        LoadRequest(
            str(i),
            float(at),
            tuple(rng.integers(1000, size=int(rng.integers(20, 400))).tolist()),
            int(rng.integers(5, 80)),
        )
        for i, at in enumerate(arrivals)
    ]


@pytest.mark.parametrize("rate", [2.0, 12.0])
def test_costs_are_found_again_from_the_answers(rate: float) -> None:
    truth = LinearCost(base=6e-3, sequence=5e-4, token=3e-5)
    config = EngineConfig(max_model_len=4096, enable_prefix_caching=False)
    played = replay(load(rate, 11), config, truth, CacheShape(4096, 4096), drain_limit=100.0)
    rng = np.random.default_rng(5)
    jittered = [_jittered(record, rng) for record in played.records]
    found = fit_cost(jittered)
    assert found is not None
    for decodes, tokens in ((1, 0), (20, 0), (4, 300), (0, 300)):
        said = found.base + found.sequence * decodes + found.token * tokens
        true = truth.base + truth.sequence * decodes + truth.token * tokens
        assert said == pytest.approx(true, rel=0.15), (decodes, tokens)


def _jittered(record: RequestRecord, rng: np.random.Generator) -> RequestRecord:
    """With stamps that are late by some tenths of a millisecond, as those of a client are."""
    import dataclasses

    late = rng.exponential(2e-4, len(record.token_times))
    times = np.maximum.accumulate(np.asarray(record.token_times) + late)
    return dataclasses.replace(record, token_times=tuple(times.tolist()))


def test_few_answers_tell_nothing() -> None:
    record = RequestRecord("0", 0.0, 0.0, (0.1, 0.2), 10, 2, 2, "finished")
    assert fit_cost([record]) is None
    assert fit_cost([]) is None
