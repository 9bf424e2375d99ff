"""What is drawn stands where the records say."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.records import RunFolder
from reports.charts.scale import SPREAD_FOR_LOG, Scale, domain
from reports.charts.svg import element, path
from reports.evidence import read_evidence
from reports.formatting import MISSING, milliseconds
from tests.reports.page import Element, Page
from tests.reports.synthetic_run import DEFAULT, WINNER, add_trial, write_run

finite = st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(finite, max_size=8), st.booleans(), st.sampled_from([None, False]))
def test_every_value_lands_inside_the_plot(
    values: list[float], zero: bool, log: bool | None
) -> None:
    low, high, chosen = domain(values, zero=zero, log=log)
    assert math.isfinite(low)
    assert low < high < math.inf
    scale = Scale(low, high, 50.0, 450.0, chosen)
    pixels = [scale(v) for v in sorted(values)]
    assert all(49.9 <= p <= 450.1 for p in pixels)
    assert all(b - a >= -1e-6 for a, b in pairwise(pixels))


@given(st.floats(-1e12, 1e12), st.floats(1e-6, 1e12), st.integers(2, 10))
def test_linear_ticks_are_round_inside_and_about_as_many(
    low: float, width: float, count: int
) -> None:
    high = low + width
    if not high - low > abs(low) * 1e-9:
        return
    ticks = Scale(low, high, 0, 100).ticks(count)
    slack = (high - low) * 1e-6
    assert all(low - slack <= t <= high + slack for t in ticks)
    assert count / 2 - 1 <= len(ticks) <= count + 1
    assert ticks == sorted(ticks)


@given(st.floats(1e-9, 1e9), st.floats(1.2, 1e12), st.integers(3, 8))
def test_log_ticks_are_inside(low: float, ratio: float, count: int) -> None:
    high = low * ratio
    ticks = Scale(low, high, 0, 100, log=True).ticks(count)
    assert all(low <= t <= high for t in ticks)
    assert len(ticks) <= 19
    if ratio > 12:
        assert ticks


def test_only_a_large_spread_of_positive_values_is_logarithmic() -> None:
    assert domain([1.0, SPREAD_FOR_LOG * 1.1])[2]
    assert not domain([1.0, SPREAD_FOR_LOG * 0.9])[2]
    assert not domain([0.0, 1e6])[2]


def test_elements_escape_what_they_are_given() -> None:
    drawn = element("text", "<b>&", data_tip='" onload="x', class_="a")
    assert str(drawn) == ('<text data-tip="&#34; onload=&#34;x" class="a">&lt;b&gt;&amp;</text>')
    assert path([(0.0, 1.0), (2.04, 3.0)], stepped=True) == "M0 1H2V3"


def marks(figure: Element, series: str, tag: str | None = None) -> list[Element]:
    """Marks with a tooltip, so without the legend's."""
    found = figure.with_class(series)
    return [m for m in found if "data-tip" in m.attributes and tag in (None, m.tag)]


def test_the_history_marks_each_outcome_by_shape(finished: RunFolder, page: Page) -> None:
    searched = [t for t in finished.read_trials() if t.kind == "search"]
    figure = page.figure("history")
    met = sum(t.slo_met for t in searched)
    failed = sum(t.outcome != "ok" for t in searched)
    assert met
    assert failed
    assert len(marks(figure, "s-met", "circle")) == met
    assert len(marks(figure, "s-failed", "path")) == failed
    assert len(marks(figure, "s-missed", "path")) == len(searched) - met - failed
    # A circle, a triangle (closed, three corners) and a cross (two open strokes).
    for series, shape in (
        ("s-missed", r"M[^M]*L[^M]*L[^M]*Z"),
        ("s-failed", r"M[^M]*L[^M]*M[^M]*L[^MZ]*"),
    ):
        for mark in marks(figure, series):
            assert re.fullmatch(shape, mark.attributes["d"])


def test_better_trials_stand_higher(finished: RunFolder, page: Page) -> None:
    measured = {t.number: t.objective for t in finished.read_trials() if t.kind == "search"}
    heights = {}
    for mark in marks(page.figure("history"), "s-met", "circle"):
        number = re.match(r"trial (\d+)", mark.attributes["data-tip"])
        assert number
        heights[int(number[1])] = -float(mark.attributes["cy"])
    ranked = sorted(heights, key=lambda n: measured[n] or 0.0)
    assert len(ranked) > 1
    assert [heights[n] for n in ranked] == sorted(heights.values())


def test_the_best_so_far_never_gets_worse(finished: RunFolder, page: Page) -> None:
    (line,) = [e for e in page.figure("history").with_class("s-best") if "V" in e.attributes["d"]]
    levels = [float(v) for v in re.findall(r"V([\d.]+)", line.attributes["d"])]
    assert levels == sorted(levels, reverse=True)


def test_percentiles_are_those_of_the_request_records(finished: RunFolder, page: Page) -> None:
    result = finished.read_run()["result"]
    records = [r for n in result["winner_trials"] for r in finished.read_requests(n)]
    of = {"TTFT": [r.ttft for r in records], "E2E": [r.e2e for r in records]}
    tips = [e.attributes["data-tip"] for e in marks(page.figure("latency"), "s-winner")]
    for metric, values in of.items():
        for percentile in (50, 90, 95, 99):
            at = milliseconds(float(np.percentile(np.array(values, dtype=float), percentile)))
            assert f"winner: p{percentile} {metric} {at}" in tips


def test_the_data_of_the_distributions_are_the_benchs(finished: RunFolder, page: Page) -> None:
    result = finished.read_run()["result"]
    chart = page.figure("latency").parent
    assert chart is not None
    rows = [[c.words for c in row.children] for row in chart.one("details").all("tr")]
    ttft = result["winner"]["ttft"]
    low, high = (milliseconds(v).removesuffix(" ms") for v in ttft["intervals"]["p95"])
    row = next(r for r in rows if r[:2] == ["TTFT", "p95"])
    assert row[3] == f"{milliseconds(ttft['p95'])} ({low}–{high})"


def test_limits_are_drawn_on_their_own_metric_only(page: Page) -> None:
    labels = {}
    for drawing in page.figure("latency").all("svg", class_="plot"):
        title = drawing.all("text", class_="panel-title")[0].words
        labels[title] = [e.words for e in drawing.all("text", class_="label s-limit")]
    assert labels == {
        "Time to first token (TTFT)": ["SLO 200 ms"],
        "Time per output token (TPOT)": ["SLO 100 ms"],
        "Inter-token latency (ITL)": [],
        "End-to-end latency (E2E)": [],
    }


def test_unfinished_requests_keep_the_curve_below_the_top(tmp_path: Path) -> None:
    def top(misses: int) -> float:
        folder = write_run(tmp_path / str(misses), trials=0, finished=False)
        add_trial(folder, 0, DEFAULT, 40, misses=misses)
        from reports.charts.distribution import latency_distributions

        figure = latency_distributions(read_evidence(folder.path))
        assert figure is not None
        drawing = Page(str(figure.drawings[0])).root
        (line,) = [e for e in drawing.with_class("line") if "s-default" in e.attributes["class"]]
        return min(float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", line.attributes["d"]))

    all_, half = top(0), top(20)
    bottom = 260 - 44.0
    assert half - all_ == pytest.approx((bottom - all_) / 2, abs=1.0)


def test_the_timeline_keeps_the_peaks(finished: RunFolder, page: Page) -> None:
    result = finished.read_run()["result"]
    steps = finished.read_steps(result["winner_trials"][0])
    chart = page.figure("timeline").parent
    assert chart is not None
    rows = [[c.words for c in row.children] for row in chart.one("details").all("tr")]
    row = next(r for r in rows if r[0].startswith("Batch") and r[1] == "winner")
    assert row[3] == str(max(s.running for s in steps))
    assert row[3] != MISSING


def test_slices_have_a_drawing_for_each_knob_that_varied(finished: RunFolder, page: Page) -> None:
    drawn = [
        [t.words for t in svg.all("text", class_="axis-title")]
        for svg in page.figure("slices").all("svg", class_="plot")
    ]
    knobs = {title for titles in drawn for title in titles} - {"goodput (requests/s)"}
    searched = [t.config for t in finished.read_trials() if t.kind == "search"]
    assert knobs == {k for k in WINNER if len({str(c[k]) for c in searched}) > 1}
