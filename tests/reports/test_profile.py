"""The sections on where the time goes, why, and what would help."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autotune.records import RunFolder
from reports import render_report
from reports.charts.breakdown import COMPONENTS, time_breakdown
from reports.charts.roofline import roofline
from reports.charts.scoreboard import scoreboard_figure
from reports.evidence import read_evidence
from reports.report import report_page
from tests.reports.page import Page
from tests.reports.synthetic_profile import (
    ADVICE,
    DIAGNOSIS,
    PROFILE,
    SCOREBOARD,
    write_profile_files,
)
from tests.reports.synthetic_run import requests_of, run_json, steps_of, write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    path = tmp_path_factory.mktemp("advised")
    run = write_run(path, trials=3, rounds=2, requests=20, result={"scoreboard": SCOREBOARD})
    write_profile_files(path)
    return run


@pytest.fixture(scope="module")
def page(folder: RunFolder) -> Page:
    return Page.read(render_report(folder.path))


def section(page: Page, name: str) -> Any:
    return page.root.one("section", id=name)


def test_each_finding_stands_under_its_metric_with_its_sentence(page: Page) -> None:
    bottlenecks = section(page, "bottlenecks")
    for finding in DIAGNOSIS["findings"]:
        assert finding["sentence"] in bottlenecks.text
    assert "tpot<10ms" in bottlenecks.text
    levels = [e.attributes["class"] for e in bottlenecks.all("li")]
    assert levels == ["level-medium", "level-high"]
    assert [e.text for e in bottlenecks.with_class("binds")] == ["binds"]
    assert "binds" in bottlenecks.all("h3")[1].text
    assert "no price was given" in bottlenecks.text


def test_advice_keeps_its_order_and_says_what_cannot_be_measured_here(page: Page) -> None:
    rows = section(page, "advice").one("table", class_="advice").all("tr", class_="head")
    assert [row.one("th").text.strip().split("\n")[0][:20] for row in rows] == [
        "Quantize the KV cach",
        "A GPU with more band",
    ]
    assert "1.31×" in rows[0].text
    assert "1.10–1.50" in rows[0].text
    assert "no: it is not here" in rows[1].text


def test_an_infeasible_limit_comes_with_proof_and_relaxation(page: Page) -> None:
    text = section(page, "advice").text
    assert "cannot be met" in text
    assert "asked 1 ms, at best 3.1 ms" in text
    assert "22 MB of weights" in text
    assert "tpot<3.4ms would be met" in text


def test_the_scoreboard_sets_what_was_measured_beside_what_was_predicted() -> None:
    figure = scoreboard_figure(SCOREBOARD)
    assert figure is not None
    assert list(figure.rows[0]) == [
        "Quantize the KV cache to int8",
        "TPOT p95",
        "1.31×",
        "1.10–1.50",
        "1.25×",
        "hit",
        "right",
    ]
    assert list(figure.rows[1][-3:]) == ["–", "–", "–"]
    assert "median error was 5%" in figure.caption


def test_phases_lie_under_the_roof_at_their_intensity() -> None:
    figure = roofline(PROFILE)
    assert figure is not None
    assert [row[0] for row in figure.rows] == ["prefill", "decode"]
    # 1.8e11 operations in 0.7 s.
    assert figure.rows[0][2] == "257 GFLOP/s"
    assert "main memory" in figure.caption
    slower = copy.deepcopy(PROFILE)
    slower["ceilings"]["bandwidth"] = slower["ceilings"]["working_set_bandwidth"]
    again = roofline(slower)
    assert again is not None
    assert "main memory" not in again.caption


def test_parts_of_a_bar_follow_each_other_and_fill_it() -> None:
    figure = time_breakdown(PROFILE)
    assert figure is not None
    shares = [row[2] for row in figure.rows if row[0] == "TTFT"]
    assert shares == ["50%", "30%", "10%", "10%"]
    assert [label for _, label in figure.legend] == [
        title
        for name, (title, _) in COMPONENTS.items()
        if any(name in b["parts"] for b in PROFILE["breakdowns"])
    ]


def test_a_profile_folder_has_a_report_of_its_own(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    run = run_json(kind="profile", slo="tpot<10ms", status="done")
    records = requests_of(1.0, 30, 0)
    folder.write_part(0, records, steps_of(records, 0))
    folder.merge_parts()
    folder.write_json(folder.run_json, run)
    write_profile_files(tmp_path)
    page = Page.read(render_report(tmp_path))
    assert "Reading keys and values takes 70%" in page.root.one("section", id="verdict").text
    assert page.root.one("section", id="engine").all("svg")


def test_a_sampled_server_shows_its_gauges_over_time(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_json(folder.run_json, run_json(kind="profile", status="done"))
    write_profile_files(tmp_path)
    page = Page.read(render_report(tmp_path))
    assert page.root.one("section", id="engine").all("svg")


_JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def _damaged(value: Any, draw: Any) -> Any:
    """The value with one place in it replaced by something else."""
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(value)))
        return {**value, key: _damaged(value[key], draw)}
    if isinstance(value, list) and value and draw(st.integers(0, 9)):
        index = draw(st.integers(0, len(value) - 1))
        return [*value[:index], _damaged(value[index], draw), *value[index + 1 :]]
    return draw(_JUNK)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_files_never_break_the_page(folder: RunFolder, data: st.DataObject) -> None:
    contents = [_damaged(c, data.draw) for c in (PROFILE, DIAGNOSIS, ADVICE)]
    write_profile_files(folder.path, *contents)
    try:
        evidence = read_evidence(folder.path)
        board = _damaged(SCOREBOARD, data.draw)
        evidence.result["scoreboard"] = board  # type: ignore[index]
        assert "</html>" in report_page(evidence)
    finally:
        write_profile_files(folder.path)


def test_files_that_are_no_json_are_as_if_absent(folder: RunFolder, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", trials=3, rounds=2, requests=20)
    for name in ("profile", "diagnosis", "advice"):
        (run.path / f"{name}.json").write_bytes(b"\xff{")
    page = Page.read(render_report(run.path))
    assert "No profile was made" in page.root.one("section", id="profile").text
