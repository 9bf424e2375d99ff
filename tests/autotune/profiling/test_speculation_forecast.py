"""What speculation would be worth by load, against the formula by hand."""

from __future__ import annotations

import pytest

from autotune.profiling.schema import Bounded
from autotune.profiling.speculation_forecast import Drafting, forecast
from autotune.profiling.step_columns import StepColumns
from engine.config import EngineConfig
from tests.autotune.profiling.loads import LinearCost, step

COST = LinearCost(step=10e-3, row=1e-3, kv_token=1e-6, pair=0, overhead=0, host=1e-3)
# Each decode sees 100 tokens.
STEPS = StepColumns.of([step(0.0, decode_sequences=2, kv_tokens_read=200) for _ in range(5)])
DRAFTINGS = [
    Drafting(2, 1.0, Bounded(value=1.5, low=1.4, high=1.6)),
    Drafting(8, 4.0, Bounded(value=2.0, low=1.8, high=2.2)),
]


def test_the_best_number_of_drafts_falls_with_the_load() -> None:
    config = EngineConfig(model="test", max_num_seqs=64, max_num_batched_tokens=4096)
    found = forecast(DRAFTINGS, config, STEPS, COST, 0.1)
    assert [load.sequences for load in found] == [1, 2, 4, 8, 16, 32, 64]
    asked = [load.num_tokens for load in found]
    assert (asked[0], asked[-1]) == (8, 0)
    assert asked == sorted(asked, reverse=True)
    assert 2 in asked
    for load in found:
        assert load.predicted is not None
        assert load.measured is None
        n = load.sequences
        gains = {0: 1.0}
        for drafting in DRAFTINGS:
            plain = 11e-3 + 1e-3 * n + 1e-4 * n
            verify = plain + 1e-3 * n * drafting.verified
            gains[drafting.asked] = drafting.tokens.value * plain / verify
        assert load.predicted.value == pytest.approx(max(gains.values()))
        assert gains[int(load.num_tokens)] == max(gains.values())


def test_the_interval_is_that_of_the_tokens_and_of_the_cost() -> None:
    config = EngineConfig(model="test", max_num_seqs=64, max_num_batched_tokens=4096)
    found = forecast(DRAFTINGS, config, STEPS, COST, 0.1)
    first, last = found[0].predicted, found[-1].predicted
    assert first is not None
    assert first.low / first.value == pytest.approx(0.9 / 1.1)
    assert first.high / first.value == pytest.approx(1.1 * 1.1)
    # Nothing drafted is no faster and no slower, for sure.
    assert last == Bounded(value=1.0, low=1.0, high=1.0)


def test_drafts_that_a_step_has_no_room_for_are_not_asked_for() -> None:
    config = EngineConfig(model="test", max_num_seqs=4, max_num_batched_tokens=12)
    found = forecast(DRAFTINGS, config, STEPS, COST, None)
    assert [load.num_tokens for load in found] == [8, 2, 2]


def test_without_decodes_nothing_is_forecast() -> None:
    config = EngineConfig(model="test")
    steps = StepColumns.of([step(0.0, prefill_tokens=4)])
    assert forecast(DRAFTINGS, config, steps, COST, None) == []
