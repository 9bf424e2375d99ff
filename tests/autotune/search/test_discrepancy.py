"""Measured over simulated, against a Gaussian process written out in exact fractions' stead."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest

from autotune.search.discrepancy import (
    COMMON,
    EXPECTED,
    OF_CLASS,
    OF_NEIGHBOURS,
    RANGE,
    Discrepancy,
)
from autotune.search.space import SearchSpace

SPACE = SearchSpace(
    {
        "quantization": ("none", "int8", "int4"),
        "kv_cache_dtype": ("auto", "int8"),
        "max_num_seqs": (4, 8, 16, 32, 64),
        "enable_prefix_caching": (True, False),
    }
)


def points(count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [{n: rng.choice(v) for n, v in SPACE.values.items()} for _ in range(count)]


def kernel(one: dict[str, Any], other: dict[str, Any]) -> float:
    seats = SPACE.values["max_num_seqs"]
    distance = abs(seats.index(one["max_num_seqs"]) - seats.index(other["max_num_seqs"])) / 4
    distance /= RANGE
    for name in ("quantization", "kv_cache_dtype", "enable_prefix_caching"):
        distance += one[name] != other[name]
    same = all(one[n] == other[n] for n in ("quantization", "kv_cache_dtype"))
    return COMMON + OF_CLASS * same + OF_NEIGHBOURS * math.exp(-distance)


@pytest.mark.parametrize("seed", range(3))
def test_means_and_covariances_are_those_of_the_process(seed: int) -> None:
    known, asked = points(7, seed), points(5, 50 + seed)
    # Small enough that no trial counts as disturbed.
    values = np.random.default_rng(seed).normal(0.0, 0.01, 7)
    found = Discrepancy(SPACE, known, {"objective": list(values)})
    noisy = np.array([[np.longdouble(kernel(a, b)) for b in known] for a in known])
    noisy += found.noise * np.eye(7)
    across = np.array([[kernel(a, b) for b in known] for a in asked])
    inverse = np.linalg.inv(noisy.astype(np.float64))
    assert found.means("objective", asked) == pytest.approx(across @ inverse @ values, abs=1e-9)
    prior = np.array([[kernel(a, b) for b in asked] for a in asked])
    root = found.root(asked)
    assert root @ root.T == pytest.approx(prior - across @ inverse @ across.T, abs=1e-9)


def test_nothing_is_known_where_nothing_was_measured() -> None:
    found = Discrepancy(SPACE, [], {})
    asked = points(3, 1)
    assert found.means("objective", asked).tolist() == [0.0, 0.0, 0.0]
    assert found.scale("objective") == EXPECTED
    assert np.sum(found.root(asked) ** 2, axis=1) == pytest.approx([1.0] * 3)


def test_what_all_trials_share_is_expected_of_others_too() -> None:
    known = points(8, 2)
    found = Discrepancy(SPACE, known, {"objective": [0.2] * 8})
    assert found.means("objective", points(4, 3)) == pytest.approx([0.2] * 4, abs=0.05)


def test_one_disturbed_trial_does_not_spoil_what_the_others_say() -> None:
    known = points(10, 4)
    rng = np.random.default_rng(5)
    calm = list(rng.normal(0.05, 0.01, 10))
    broken = [*calm[:-1], calm[-1] - 0.8]
    asked = points(5, 6)
    quiet = Discrepancy(SPACE, known, {"objective": calm, "tpot.p95": calm})
    upset = Discrepancy(SPACE, known, {"objective": broken, "tpot.p95": broken})
    moved = np.abs(upset.means("objective", asked) - quiet.means("objective", asked))
    assert moved.max() < 0.1
    assert upset.scale("objective") < 0.25


def test_a_quantity_that_a_trial_lacks_is_learnt_from_the_others() -> None:
    known = points(6, 7)
    with_hole = [0.1, 0.1, math.nan, 0.1, 0.1, 0.1]
    found = Discrepancy(SPACE, known, {"limit ttft<1s": with_hole})
    assert found.means("limit ttft<1s", [known[2]])[0] == pytest.approx(0.1, abs=0.04)
