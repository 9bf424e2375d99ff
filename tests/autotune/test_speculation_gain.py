"""The measured speed-up, against worlds where it is known."""

from __future__ import annotations

import numpy as np
import pytest

from autotune.speculation_gain import doublings, gains_by_batch
from tests.autotune.drafted_steps import drafted_load, drafted_step
from tests.autotune.profiling.loads import step


def truth(
    batch: int, *, k: int, chance: float, hit: float, base: float, row: float, drafting: float
) -> float:
    """Tokens a step gets times a step without drafts, over a mean step with them."""
    tokens = 1 + hit * sum(chance**d for d in range(1, k + 1))
    return tokens * (base + row * batch) / (base + row * batch * (1 + hit * k) + drafting)


@pytest.mark.parametrize("row", [0.1e-3, 3e-3])
def test_a_known_speedup_is_found(row: float) -> None:
    world = {"k": 3, "chance": 0.7, "hit": 0.6, "base": 10e-3, "row": row, "drafting": 0.5e-3}
    found = gains_by_batch(drafted_load(3000, noise=0.1, seed=2, **world))  # type: ignore[arg-type]
    assert len(found) == 1
    (one,) = found
    assert (one["sequences"], one["steps"]) == (1.0, 3000)
    expected = truth(1, **world)  # type: ignore[arg-type]
    assert one["measured"]["value"] == pytest.approx(expected, rel=0.03)
    assert one["measured"]["low"] < expected < one["measured"]["high"]
    assert one["tokens_per_step"] == pytest.approx(1 + 0.6 * (0.7 + 0.49 + 0.343), rel=0.03)
    assert one["num_tokens"] == pytest.approx(1.8, rel=0.03)


def test_each_doubling_of_the_load_has_its_own() -> None:
    world = {"k": 4, "chance": 0.6, "hit": 0.3, "base": 10e-3, "row": 2e-3, "drafting": 0.0}
    loads = [
        s
        for batch in (1, 2, 4)
        for s in drafted_load(4000, batch=lambda _, n=batch: n, seed=batch, **world)  # type: ignore[misc, arg-type]
    ]
    found = gains_by_batch(loads)
    assert [row["sequences"] for row in found] == [1.0, 2.0, 4.0]
    for row in found:
        expected = truth(int(row["sequences"]), **world)  # type: ignore[arg-type]
        assert row["measured"]["value"] == pytest.approx(expected, rel=0.05), row
    values = [row["measured"]["value"] for row in found]
    assert values == sorted(values, reverse=True)
    assert values[-1] < 1.0


def test_batches_of_a_range_are_held_against_steps_of_their_own_size() -> None:
    # Of 3 all steps have drafts but one in twenty, of 4 the other way round; 4 is much slower.
    rng = np.random.default_rng(8)
    steps = []
    for i in range(4000):
        batch = 3 + i % 2
        drafts = rng.random() < (0.95 if batch == 3 else 0.05)
        seconds = 10e-3 if batch == 3 else 40e-3
        steps.append(drafted_step(float(i), seconds, batch, [1] * drafts, [1] * drafts))
    (found,) = gains_by_batch(steps)
    # Steps take as long with drafts as without: all that is gained are the tokens.
    expected = (0.95 * (1 + 1 / 3) + 0.05 + 4 * (0.05 * 1.25 + 0.95)) / 5
    assert found["measured"]["value"] == pytest.approx(expected, rel=0.01)


def test_without_plain_steps_nothing_was_measured() -> None:
    (found,) = gains_by_batch(drafted_load(500, hit=1.0))
    assert found["measured"] is None
    assert found["tokens_per_step"] > 1.5


def test_what_cannot_tell_is_left_out() -> None:
    assert gains_by_batch([]) == []
    assert gains_by_batch([step(float(i), decode_sequences=2) for i in range(100)]) == []
    assert gains_by_batch(drafted_load(19)) == []
    prompts = [step(float(i), decode_sequences=2, prefill_tokens=5) for i in range(100)]
    assert gains_by_batch(prompts) == []


def test_the_interval_holds_the_truth_mostly() -> None:
    world = {"k": 3, "chance": 0.7, "hit": 0.6, "base": 10e-3, "row": 1e-3, "drafting": 0.5e-3}
    expected = truth(1, **world)  # type: ignore[arg-type]
    held = 0
    for seed in range(60):
        (found,) = gains_by_batch(drafted_load(400, noise=0.2, seed=seed, **world))  # type: ignore[arg-type]
        held += found["measured"]["low"] <= expected <= found["measured"]["high"]
    assert held >= 50


def test_doublings() -> None:
    assert doublings([1, 2, 3, 4, 5, 8, 9, 16]).tolist() == [0, 1, 2, 2, 3, 3, 4, 4]
