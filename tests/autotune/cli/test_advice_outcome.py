"""What the terminal says of advice, before the search follows it and afterwards."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from autotune.cli.advice_outcome import print_infeasible_limits, print_scoreboard
from autotune.cli.search_progress import SearchProgress

GAIN = {"metric": "tpot", "statistic": "p95", "value": 2.0, "low": 1.5, "high": 2.5}


def console() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=120), out


def entry(title: str, measured: float | None, held: bool | None) -> dict[str, Any]:
    return {
        "title": title,
        "metric": "tpot",
        "statistic": "p95",
        "predicted": GAIN,
        "measured": None if measured is None else {"value": measured, "low": None, "high": None},
        "held": held,
    }


def test_the_scoreboard_has_a_line_for_what_was_measured_and_a_sum() -> None:
    terminal, out = console()
    entries = [
        entry("int8 weights", 1.9, True),
        entry("smaller batches", 0.8, False),
        entry("never tried", None, None),
    ]
    print_scoreboard(
        terminal,
        {
            "entries": entries,
            "scored": 2,
            "held": 1,
            "direction_right": 1,
            "median_error": 0.78,
        },
    )
    lines = [line.split() for line in out.getvalue().splitlines() if line.strip()]
    assert lines[1][-3:] == ["2.5)", "1.9x", "hit"]
    assert lines[2][-1] == "miss"
    assert "never tried" not in out.getvalue()
    assert "Of 2 predictions 1 held, 1 had the direction right; median error 78%." in out.getvalue()


def test_nothing_scored_prints_nothing() -> None:
    terminal, out = console()
    print_scoreboard(terminal, {})
    print_scoreboard(terminal, {"entries": [entry("never tried", None, None)], "scored": 0})
    print_infeasible_limits(terminal, [])
    assert out.getvalue() == ""


def test_a_limit_that_cannot_be_met_comes_with_what_would_be_enough() -> None:
    terminal, out = console()
    limit = {
        "limit": "tpot<1ms",
        "proof": "tpot<1ms cannot be met here: 22 MB of weights take 3 ms",
        "relaxations": ({"sentence": "a limit of 3.1 ms"}, {"sentence": "18% less load"}),
    }
    print_infeasible_limits(terminal, [limit])
    assert [line for line in out.getvalue().splitlines() if line] == [
        "tpot<1ms cannot be met here: 22 MB of weights take 3 ms",
        "  a limit of 3.1 ms",
        "  18% less load",
    ]


def test_findings_and_advice_are_told_before_they_are_followed() -> None:
    terminal, out = console()
    findings = [
        {
            "bottleneck": "decode_weights",
            "level": "high",
            "sentence": "Decode streams the weights.",
        },
        {"bottleneck": "decode_weights", "level": "medium", "sentence": "Of what is paid, too."},
        {"bottleneck": "low_load", "level": "low", "sentence": "A trifle."},
    ]
    advice = [
        {"title": "int8 weights", "gain": GAIN, "testable": True},
        {"title": "another GPU", "gain": None, "testable": False},
    ]
    with SearchProgress(terminal, "requests/s") as progress:
        progress.advised(findings, advice)
    assert [line.rstrip() for line in out.getvalue().splitlines()] == [
        "finding      Decode streams the weights.",
        "advice       int8 weights: 2x tpot p95 (1.5 to 2.5) predicted",
        "advice       another GPU: gain not predicted  not testable here",
    ]
