"""What a profile says of a load that speculated, against worlds where it is known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from autotune.profiling.evidence import LoadEvidence
from autotune.profiling.schema import MeasuredSpeculation
from autotune.profiling.speculation_measured import by_request, draft_cost, measured_speculation
from engine.config import EngineConfig
from engine.step_record import StepRecord
from tests.autotune.drafted_steps import drafted_load, drafted_step
from tests.autotune.profiling.loads import LinearCost, request, step

CONFIG = EngineConfig(model="test", speculative_method="ngram", num_speculative_tokens=3)
# The cost of `drafted_load`'s steps, whose host drafts and does nothing else.
COST = LinearCost(step=10e-3, row=1e-3, kv_token=0, pair=0, overhead=0, host=0)


def measured(
    steps: list[StepRecord], cost: LinearCost | None = COST, error: float | None = 0.1
) -> MeasuredSpeculation:
    found, partial = measured_speculation(LoadEvidence([], steps), CONFIG, cost, error)
    assert found is not None
    assert not partial
    return found


def test_the_section_says_what_was_drafted_and_what_it_was_worth() -> None:
    found = measured(drafted_load(2000, chance=0.7, hit=0.6))
    assert (found.method, found.num_speculative_tokens, found.adaptive) == ("ngram", 3, True)
    assert found.hit_share == pytest.approx(0.6, abs=0.05)
    expected = 1 + 0.6 * (0.7 + 0.49 + 0.343)
    assert found.tokens_per_step.low < expected < found.tokens_per_step.high
    shares = [p.share.value for p in found.positions if p.share is not None]
    assert shares == pytest.approx([0.7, 0.49, 0.343], abs=0.06)
    (load,) = found.loads
    assert load.measured is not None
    assert load.predicted is not None
    speedup = expected * 11 / (11 + 0.6 * 3 + 0.5)
    assert load.predicted.value == pytest.approx(speedup, rel=0.03)
    assert load.measured.value == pytest.approx(load.predicted.value, rel=0.03)
    assert load.predicted.high / load.predicted.value == pytest.approx(1.1)
    assert load.predicted.low < load.predicted.value


def test_what_is_predicted_needs_no_step_without_drafts_but_a_cost() -> None:
    steps = drafted_load(500, hit=1.0)
    (load,) = measured(steps).loads
    assert load.measured is None
    assert load.predicted is not None
    (load,) = measured(steps, cost=None).loads
    assert load.predicted is None


def test_several_loads_are_each_predicted() -> None:
    world = {"base": 10e-3, "row": 1e-3, "noise": 0.0, "hit": 0.3}
    steps = drafted_load(400, batch=lambda _: 1, **world)  # type: ignore[arg-type]
    steps += drafted_load(400, batch=lambda rng: int(rng.integers(5, 9)), **world)  # type: ignore[arg-type]
    found = measured(steps)
    assert [int(load.sequences) for load in found.loads] == [1, 6]
    for load in found.loads:
        assert load.predicted is not None
        assert load.measured is not None
        assert load.measured.value == pytest.approx(load.predicted.value, rel=0.02)
    assert found.loads[0].predicted.value > found.loads[1].predicted.value  # type: ignore[union-attr]


def test_a_load_without_speculation_has_no_section() -> None:
    evidence = LoadEvidence([], [step(float(i), decode_sequences=1) for i in range(30)])
    plain = EngineConfig(model="test")
    assert measured_speculation(evidence, plain, COST, None) == (None, [])


def test_a_load_that_never_decodes_says_so() -> None:
    evidence = LoadEvidence([], [step(float(i), prefill_tokens=5) for i in range(30)])
    found, partial = measured_speculation(evidence, CONFIG, COST, None)
    assert found is None
    assert "no step decoded" in partial[0]


def test_few_drafts_are_said_to_be_few() -> None:
    found, partial = measured_speculation(
        LoadEvidence([], drafted_load(15, hit=1.0)), CONFIG, COST, None
    )
    assert found is not None
    assert partial == ["what drafts yield needs at least 20 steps; has 15"]


def test_tokens_a_step_differ_by_request() -> None:
    def answer(name: int, each: int) -> object:
        times = [0.0, *np.repeat(np.arange(1.0, 21.0), each).tolist()]
        return request(str(name), token_times=times, output_tokens=len(times))

    requests = [answer(i, 1 if i < 15 else 3) for i in range(30)]
    found = by_request(requests)  # type: ignore[arg-type]
    assert found is not None
    assert (found.value, found.low, found.high) == (2.0, 1.0, 3.0)
    assert by_request(requests[:19]) is None  # type: ignore[arg-type]
    short = [request(str(i), token_times=(0.0, 1.0, 2.0)) for i in range(30)]
    assert by_request(short) is None


def test_what_drafting_costs_is_found_again() -> None:
    rng = np.random.default_rng(4)
    steps = []
    for i in range(400):
        batch, depth = int(rng.integers(1, 9)), int(rng.integers(0, 6))
        seconds = 1e-3 + 2e-4 * batch + 3e-3 * depth + 1e-4 * depth * batch
        drafted = [depth] * batch if depth else []
        steps.append(
            drafted_step(
                float(i),
                0.1,
                batch,
                drafted,
                [0] * len(drafted),
                host=seconds,
                draft_seconds=seconds,
            )
        )
    # One that compiles something first.
    steps[0] = dataclasses.replace(steps[0], draft_seconds=3.0)
    found = draft_cost(steps)
    assert found is not None
    assert found.depth == pytest.approx(3e-3, rel=0.05)
    assert found.depth_sequence == pytest.approx(1e-4, rel=0.3)
    assert found.base == pytest.approx(1e-3, rel=0.3)
    assert draft_cost(steps[:19]) is None
    assert draft_cost([step(float(i), decode_sequences=1) for i in range(50)]) is None
