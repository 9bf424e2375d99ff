"""How numbers of a simulation are written."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from autotune.cli.simulate_summary import _cell, _lines, _number
from autotune.simulation.interval import Interval
from autotune.simulation.run import SimulateOutcome


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.0, "0"),
        (0.0123, "0.01"),
        (0.123, "0.12"),
        (1.234, "1.23"),
        (12.34, "12.3"),
        (99.96, "100"),
        (123.4, "123"),
        (9876.0, "9876"),
        (80.0, "80"),
    ],
)
def test_numbers_are_short(number: float, text: str) -> None:
    assert _number(number) == text


def test_bounds_stand_in_brackets_if_they_say_something() -> None:
    assert _cell(Interval(1.5, 1.0, 2.25), 1e3) == "1500 (1000-2250)"
    assert _cell(Interval(0.5, 0.25, 0.75), 100, "%") == "50% (25-75)"
    assert _cell(Interval(80.0, 80.0, 80.0)) == "80"
    assert _cell(None) == "-"


def test_drafts_are_told_by_position() -> None:
    def same(value: float) -> Interval:
        return Interval(value, value, value)

    names = ("output_tokens_per_s", "requests_per_s", "goodput_requests_per_s", "offered_rate")
    metrics: dict[str, Any] = dict.fromkeys((*names, "slo_attainment", "completed"), same(1.0))
    metrics |= dict.fromkeys(("failed", "refused", "timed_out"), same(0.0))
    engine = ("mean_batch", "kv_peak_usage", "prefix_hit_rate", "preemptions")
    metrics["engine"] = dict.fromkeys(engine, same(0.0))
    drafts = {
        "tokens_per_step": Interval(1.5, 1.25, 1.75),
        "acceptance": {"1": Interval(0.5, 0.25, 0.75), "2": same(0.25), "3": None},
    }

    def told(speculation: object) -> dict[str, str]:
        simulated = SimpleNamespace(metrics={**metrics, "speculation": speculation})
        outcome = SimpleNamespace(simulated=simulated, fleet="1 engine")
        return dict(_lines(cast(SimulateOutcome, outcome)))

    found = told(drafts)
    assert found["tokens a step"] == "1.5 (1.25-1.75)"
    assert found["accepted by position"] == "50% (25-75), 25%"
    assert "tokens a step" not in told(None)
