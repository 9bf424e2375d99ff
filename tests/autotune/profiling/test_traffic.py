"""What arrived, in numbers."""

from __future__ import annotations

import numpy as np
import pytest

from autotune.profiling.evidence import LoadEvidence
from autotune.profiling.traffic import (
    gap_variation,
    index_of_dispersion,
    spread,
    top_share,
    traffic,
)
from tests.autotune.profiling.loads import request


def test_even_poisson_and_bunched_arrivals_are_told_apart() -> None:
    rng = np.random.default_rng(0)
    even = list(np.arange(2000) * 0.1)
    poisson = list(np.cumsum(rng.exponential(0.1, 2000)))
    # Bunches of ten at once, a second apart on the mean.
    bunched = sorted(np.repeat(np.cumsum(rng.exponential(1.0, 200)), 10).tolist())
    assert gap_variation(even) == pytest.approx(0.0, abs=1e-6)
    assert gap_variation(poisson) == pytest.approx(1.0, rel=0.1)
    bunched_cv = gap_variation(bunched)
    assert bunched_cv is not None
    assert bunched_cv > 3
    dispersions = [index_of_dispersion(arrivals)[0] for arrivals in (even, poisson, bunched)]
    assert dispersions[0] == pytest.approx(0.0, abs=0.1)
    assert dispersions[1] == pytest.approx(1.0, rel=0.2)
    assert dispersions[2] == pytest.approx(10.0, rel=0.3)


def test_arrivals_at_once_have_no_gaps() -> None:
    assert gap_variation([0.0] * 30) is None
    assert index_of_dispersion([0.0] * 30) == (None, None)


def test_the_longest_tenth_of_the_answers_is_counted_whole() -> None:
    assert top_share([1] * 10) == pytest.approx(0.1)
    assert top_share([1] * 19 + [81]) == pytest.approx(82 / 100)
    assert top_share([]) is None


def test_spreads_are_percentiles() -> None:
    found = spread([float(i) for i in range(101)])
    assert found is not None
    assert (found.mean, found.p50, found.p95, found.p99, found.max) == (50, 50, 95, 99, 100)
    assert spread([]) is None


def test_outcomes_and_lengths_are_those_of_the_records() -> None:
    records = [
        request(str(i), intended_send=i / 2, input_tokens=30, output_tokens=10) for i in range(30)
    ]
    records += [
        request("r", intended_send=15.0, token_times=(), outcome="refused", asked_output_tokens=40),
        request("t", intended_send=15.5, token_times=(16.0,), outcome="timed_out"),
    ]
    found, partial = traffic(LoadEvidence(records, [], synthetic_prompts=False), 20.0)
    assert not partial
    assert (found.requests, found.completed, found.refused, found.timed_out) == (32, 30, 1, 1)
    assert found.rate == pytest.approx(2.0)
    assert found.duration_s == 20.0
    # What did not finish counts with the answer that was asked for.
    assert found.output_tokens is not None
    assert found.output_tokens.max == 40
    assert found.prompt_output_ratio == pytest.approx((30 * 30 + 20) / (300 + 40 + 1))
    assert found.texts is True


def test_few_requests_have_lengths_and_no_burstiness() -> None:
    records = [request(str(i), intended_send=float(i)) for i in range(19)]
    found, partial = traffic(LoadEvidence(records, []), 20.0)
    assert found.input_tokens is not None
    assert found.arrival_cv is found.dispersion is found.top_output_share is None
    assert partial == ["the burstiness of arrivals needs at least 20 requests; has 19"]
    assert found.texts is None


def test_nothing_at_all_is_no_error() -> None:
    found, _ = traffic(LoadEvidence([], []), 0.0)
    assert found.requests == 0
    assert found.rate is found.input_tokens is found.prompt_output_ratio is None
