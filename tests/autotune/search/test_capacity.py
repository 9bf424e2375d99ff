from __future__ import annotations

from typing import Any

import pytest

from autotune.search.capacity import find_capacity
from autotune.search.messages import Failed, Measured
from autotune.slo import parse_slo

SLO = parse_slo("ttft<100ms")


def server(limit: float) -> Any:
    """A server that keeps the SLO up to a rate factor."""

    def measure(factor: float) -> Measured:
        p95 = 0.05 if factor <= limit else 0.5
        ttft = {"p95": p95, "p50": p95, "mean": p95, "p90": p95, "p99": p95}
        return Measured({"ttft": ttft, "load_delivered": True, "offered_rate": factor})

    return measure


@pytest.mark.parametrize("limit", [0.2, 0.9, 1.0, 1.7, 5.0])
def test_bracket_closes_in_on_the_limit_from_below(limit: float) -> None:
    found = find_capacity(server(limit), SLO, start=1.0, probes=12)
    assert not isinstance(found, Failed)
    assert found.factor <= limit
    assert found.factor == pytest.approx(limit, rel=0.1)
    assert found.metrics["offered_rate"] == found.factor


def test_no_rate_that_meets_the_slo_is_a_capacity_of_zero() -> None:
    found = find_capacity(server(0.0), SLO, start=1.0, probes=4)
    assert not isinstance(found, Failed)
    assert found.factor == 0.0
    assert found.metrics["ttft"]["p95"] == 0.5


def test_undelivered_load_does_not_count_as_met() -> None:
    def measure(factor: float) -> Measured:
        reply: Measured = server(10.0)(factor)
        return Measured({**reply.metrics, "load_delivered": factor <= 2.0})

    found = find_capacity(measure, SLO, start=1.0, probes=12)
    assert not isinstance(found, Failed)
    assert found.factor == pytest.approx(2.0, rel=0.1)
    assert found.factor <= 2.0


@pytest.mark.parametrize("limit", [0.0, 0.3, 1.0, 1.3, 2.0, 100.0])
def test_what_was_kept_last_is_the_outcome(limit: float) -> None:
    loads: list[dict[str, Any]] = []
    kept: list[dict[str, Any]] = []

    def measure(factor: float) -> Measured:
        reply: Measured = server(limit)(factor)
        loads.append(reply.metrics)
        return reply

    found = find_capacity(measure, SLO, 1.0, 6, keep=lambda: kept.append(loads[-1]))
    assert not isinstance(found, Failed)
    assert kept[-1] is found.metrics


def test_failure_ends_the_search() -> None:
    assert find_capacity(lambda _: Failed("crash", "why"), SLO, 1.0, 5) == Failed("crash", "why")
