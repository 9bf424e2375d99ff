"""The page of a simulation tells its numbers with their bounds, as predictions."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from autotune.records import RunFolder
from reports import render_report
from tests.reports.page import Page
from tests.reports.synthetic_plan import interval, latencies
from tests.reports.synthetic_run import run_json

HOSTILE = "<img src=x onerror=alert(1)>{{7*7}}\u202e"


def simulation(share: float | None = 0.8, **changes: Any) -> dict[str, Any]:
    made = {
        "ttft": latencies(0.15, 0.2),
        "tpot": latencies(0.05, 0.1),
        "itl": {"mean": None},
        "e2e": latencies(2.0, 0.1),
        "output_tokens_per_s": interval(210.0, 0.1),
        "error_rate": interval(0.0),
        "engine": {"mean_batch": interval(9.0), "kv_peak_usage": interval(0.4)},
        "p_meets_slo": share,
        "slo": [
            {"limit": "ttft<200ms", "expected": interval(0.15, 0.2), "p_met": 0.8},
            {"limit": "tpot<100ms", "expected": None, "p_met": 0.0},
        ],
        "draws": 20,
        "fleet": {"engines": 3, "router": "least_loaded"},
        "costs": {"kind": "calibration", "where": "profile", "step_error": 0.04},
        "notes": ["The calibration is of another version."],
    }
    return {**made, **changes}


def render(path: Path, content: dict[str, Any] | None, **run: Any) -> Page:
    path.mkdir(exist_ok=True)
    folder = RunFolder(path)
    folder.write_json(folder.run_json, run_json(kind="simulate", status="done", **run))
    if content is not None:
        (path / "simulation.json").write_text(json.dumps(content))
    return Page.read(render_report(path))


def test_it_says_how_sure_the_slo_is_and_that_nothing_was_measured(tmp_path: Path) -> None:
    page = render(tmp_path, simulation())
    assert page.headline == "80% chance to meet the SLO"
    assert page.badge == "△ Likely to meet the SLO"
    lead = page.verdict.with_class("lead")[0].words
    assert lead.startswith("Predicted, not measured: 6 requests/s of azure")
    assert "on 3 engines (least loaded) in 20 draws" in lead
    (table,) = page.verdict.with_class("slo")
    rows = [[cell.words for cell in row.children] for row in table.all("tr")[1:]]
    assert rows == [
        ["ttft<200ms", "150 ms (120–180)", "△ 80%"],
        ["tpot<100ms", "–", "✗ none of 20 draws"],
    ]
    assert "another version" in page.verdict.words


@pytest.mark.parametrize(
    ("share", "headline", "badge"),
    [
        (1.0, "All of 20 draws meet the SLO", "✓ Expected to meet the SLO"),
        (0.0, "None of 20 draws meets the SLO", "✗ Likely to miss the SLO"),
        (0.3, "30% chance to meet the SLO", "✗ Likely to miss the SLO"),
        (None, "Simulated without a limit to judge by", "○ Simulated"),
    ],
)
def test_certainty_is_never_claimed(
    tmp_path: Path, share: float | None, headline: str, badge: str
) -> None:
    page = render(tmp_path, simulation(share))
    assert page.headline == headline
    assert page.badge == badge


def test_intervals_and_limits_stand_in_their_places(tmp_path: Path) -> None:
    drawings = render(tmp_path, simulation()).figure("forecast").all("svg", class_="plot")
    assert len(drawings) == 3  # no request had a second token, as far as ITL goes
    ttft = drawings[0]
    (limit,) = [e for e in ttft.with_class("s-limit") if e.tag == "path"]
    at = float(re.findall(r"M([\d.]+)", limit.attributes["d"])[0])
    marks = [e for e in ttft.all("circle") if "data-tip" in e.attributes]
    places = {m.attributes["data-tip"].split(" ")[0]: float(m.attributes["cx"]) for m in marks}
    # p95 of 150 ms lies before the limit of 200 ms, p99 of 210 ms behind it.
    assert places["p95"] < at < places["p99"]
    assert not drawings[2].with_class("s-limit")


def test_a_folder_without_its_numbers_and_hostile_ones_are_reported(tmp_path: Path) -> None:
    page = render(tmp_path / "empty", None)
    assert page.headline == "Simulated without a limit to judge by"
    bad = simulation(notes=[HOSTILE], costs={HOSTILE: HOSTILE}, fleet={"engines": 1e300})
    bad["slo"] = [{"limit": HOSTILE, "expected": {"value": 1e308}, "p_met": 1e308}]
    page = render(tmp_path / "bad", bad, model={"name": HOSTILE}, slo=HOSTILE)
    assert not page.root.all("img")
    assert not re.search("[\u202a-\u202e]", page.html)
    for element in page.elements:
        assert not any(name.startswith("on") for name in element.attributes)
        assert element.attributes.get("href", "#").startswith("#")


def test_drafts_that_were_simulated_are_shown_with_their_bounds(tmp_path: Path) -> None:
    drafts = {
        "tokens_per_step": interval(1.8, 0.1),
        "hit_share": interval(0.4, 0.1),
        "acceptance": {"1": interval(0.8, 0.05), "2": interval(0.6, 0.05), "3": None},
    }
    page = render(tmp_path / "with", simulation(speculation=drafts))
    shown = page.root.one("section", id="speculation")
    assert "1.8 (1.62–1.98)" in shown.text
    assert "40% (36–44)" in shown.text
    rows = shown.one("figure").text
    assert "90% intervals of the draws" in rows
    assert "80% (76–84)" in shown.text
    without = render(tmp_path / "without", simulation(speculation=None))
    assert not [e for e in without.root.all("section") if e.attributes["id"] == "speculation"]
