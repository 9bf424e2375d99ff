"""Of every trial the report tells what was predicted beside what was measured, and how far off."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

import pytest

from autotune.records import RunFolder
from reports import render_report
from reports.evidence import read_evidence
from reports.predictions import error_rows, prediction_sentence, read_pairs
from tests.reports.page import Page
from tests.reports.synthetic_run import DEFAULT, WINNER, add_trial, write_run

# By trial; 0.3 lies outside the bounds of a tenth.
OFF = (None, 0.02, -0.05, 0.3, 0.08)


@pytest.fixture(scope="module")
def predicted(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = write_run(tmp_path_factory.mktemp("predicted"), trials=0, finished=False)
    for number, off in enumerate(OFF):
        config = DEFAULT if number == 0 else {**WINNER, "block_size": 8 << (number % 3)}
        add_trial(folder, number, config, 40, seed=number, whole=False, off=off)
    render_report(folder.path)
    return folder


@pytest.fixture(scope="module")
def shown(predicted: RunFolder) -> Page:
    return Page.read(predicted.report_html)


def test_predictions_stand_beside_measurements(predicted: RunFolder, shown: Page) -> None:
    table = shown.root.one("table", id="trials")
    heads = [head.words for head in table.all("th")]
    at = heads.index("TTFT p95 (ms)")
    assert heads[at + 1] == "predicted"
    for trial, row in zip(predicted.read_trials(), table.all("tbody")[0].all("tr"), strict=True):
        cells = row.children
        assert trial.metrics is not None
        assert float(cells[at].attributes["data-key"]) == trial.metrics["ttft"]["p95"]
        if trial.predicted is None:
            assert cells[at + 1].words == ""
            assert cells[at + 1].attributes["data-key"] == ""
            continue
        told = trial.predicted["metrics"]["ttft.p95"]
        assert float(cells[at + 1].attributes["data-key"]) == told["value"]
        numbers = [float(x.replace(",", "")) for x in re.findall(r"[\d.,]+", cells[at + 1].words)]
        wanted = [1000 * told[key] for key in ("value", "low", "high")]
        assert numbers == pytest.approx(wanted, rel=0.01)
        assert cells[heads.index("Chance predicted")].words == "75%"


def test_the_sentence_tells_the_median_error_and_how_many_held(predicted: RunFolder) -> None:
    pairs = read_pairs(read_evidence(predicted.path))
    told = [off for off in OFF if off is not None]
    each = 8  # the objective, three latencies at mean and p95, and the throughput
    assert len(pairs) == each * len(told)
    median = statistics.median(abs(off) for off in told)
    held = each * sum(1 for off in told if off != 0.3)
    assert prediction_sentence(pairs) == (
        f"Before each of the 4 trials ran, its metrics were predicted: the median error was "
        f"{100 * median:.2g}%, and {held} of {len(pairs)} measurements ({100 * held / len(pairs):g}"
        "%) lay within their 90% intervals. The intervals were too narrow: trust the "
        "measurements, not the bands."
    )
    assert prediction_sentence(pairs) in Page.read(predicted.report_html).root.words


def test_errors_are_told_by_metric(predicted: RunFolder) -> None:
    rows = error_rows(read_pairs(read_evidence(predicted.path)))
    assert [row[0] for row in rows] == [
        "goodput",
        *(f"{metric} {name}" for metric in ("TTFT", "TPOT", "E2E") for name in ("mean", "p95")),
        "Output",
    ]
    assert all(row[1:] == ["4", "6.5%", "30%", "3 of 4"] for row in rows)


def test_the_scatter_marks_what_lay_outside_its_interval(shown: Page) -> None:
    figure = shown.figure("calibration")
    drawings = figure.all("svg", class_="plot")
    assert len(drawings) == 6
    for drawing in drawings:
        marks = [e for e in drawing.with_class("mark") if "data-tip" in e.attributes]
        outside = [m for m in marks if "s-missed" in m.attributes["class"]]
        assert len(marks) == 4
        assert [re.match(r"trial (\d)", m.attributes["data-tip"])[1] for m in outside] == ["3"]  # type: ignore[index]
        # One upright line an interval, of no width.
        lines = [e.attributes["d"] for e in drawing.with_class("whisker")]
        assert len(lines) == 4
        for line in lines:
            x0, x1 = re.findall(r"[ML]([\d.]+) ", line)
            assert x0 == x1


def test_a_prediction_too_high_stands_above_the_diagonal(shown: Page) -> None:
    drawing = shown.figure("calibration").all("svg", class_="plot")[0]
    (diagonal,) = [e for e in drawing.with_class("line") if "s-default" in e.attributes["class"]]
    (x0, y0), (x1, y1) = (
        (float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", diagonal.attributes["d"])
    )
    (mark,) = [
        e
        for e in drawing.with_class("mark")
        if e.attributes.get("data-tip", "").startswith("trial 3")
    ]
    x, y = (float(v) for v in re.findall(r"[\d.]+", mark.attributes["d"])[:2])
    assert y < y0 + (x - x0) / (x1 - x0) * (y1 - y0)


def test_runs_without_predictions_say_nothing_of_them(page: Page) -> None:
    assert "predicted" not in [head.words for head in page.root.one("table", id="trials").all("th")]
    assert not page.root.all("figure", aria_labelledby="caption-calibration")
    assert "Errors of the predictions" not in page.html


def test_damaged_predictions_are_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", trials=0, finished=False)
    trial = add_trial(folder, 0, DEFAULT, 10)
    line = folder.trials_jsonl.read_text()
    broken = line.replace(
        '"predicted": null',
        '"predicted": {"metrics": {"ttft.p95": {"value": "x"}, "tpot": 3}, "objective": [1]}',
    )
    assert broken != line
    folder.trials_jsonl.write_text(broken)
    assert read_pairs(read_evidence(folder.path)) == []
    assert Page.read(render_report(folder.path)).headline
    assert trial.metrics is not None
