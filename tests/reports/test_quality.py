"""The frontier of speed against quality, and the table of the methods."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from autotune.records import RunFolder
from reports import render_report
from reports.charts.labels import place_labels
from tests.reports.page import Element, Page
from tests.reports.synthetic_run import DEFAULT, HARM, add_trial, quality_of, run_json, speed_of

GUARD = ("quality_loss<1%", 0.01)


def render(
    path: Path, methods: list[str], guard: tuple[str, float] | None = GUARD
) -> tuple[RunFolder, Page]:
    path.mkdir(exist_ok=True)
    folder = RunFolder(path)
    number = 0
    for method in methods:
        for block_size in (16, 32):
            config = {**DEFAULT, "quantization": method, "block_size": block_size}
            number += number % 8 == 5  # the number that runs out of memory
            add_trial(folder, number, config, 60, seed=3, guard=guard)
            number += 1
    folder.write_json(folder.run_json, run_json(status="interrupted"))
    return folder, Page.read(render_report(path))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return render(tmp_path_factory.mktemp("guarded"), list(HARM))[1]


def rows_of(page: Page, label: str) -> list[dict[str, str]]:
    (region,) = page.root.all("div", aria_label=f"{label}, table")
    head = [cell.words for cell in region.one("thead").all("th")]
    return [
        dict(zip(head, (cell.words.replace("\xa0", " ") for cell in row.all("td")), strict=True))
        for row in region.one("tbody").all("tr")
    ]


def marks(page: Page) -> list[Element]:
    return [e for e in page.figure("frontier").with_class("mark") if "data-tip" in e.attributes]


def test_the_table_holds_each_method_with_its_intervals(page: Page) -> None:
    rows = rows_of(page, "Quality of each way of quantizing")
    assert [row["Method"] for row in rows] == list(HARM)
    int4 = next(row for row in rows if row["Method"] == "int4")
    quality = quality_of({"quantization": "int4"})
    assert int4["Perplexity"].startswith("+1.37% (")
    low, high = (float(f"{100 * quality[f'quality_loss_{e}']:.3g}") for e in ("low", "high"))
    assert f"({low:g} to {high:g})" in int4["Perplexity"]
    assert int4["KL, mean (nats)"] == "0.024 (0.0228 to 0.0252)"
    assert int4["Top-1 agreement"].startswith("90.4% (")
    assert int4["Weights"] == "3.81 MiB"


def test_the_guard_is_told_and_where_the_interval_leaves_it_open(page: Page) -> None:
    rows = rows_of(page, "Quality of each way of quantizing")
    assert list(rows[0])[:2] == ["Method", "Guard"]  # the others may need scrolling
    guards = {row["Method"]: row["Guard"] for row in rows}
    assert guards["int8"] == "met: quality_loss<1%"
    assert guards["gptq"] == "met: quality_loss<1%, within the interval"
    assert guards["int4"].startswith("broken: quality_loss<1%")


def test_what_breaks_the_guard_stands_in_the_shaded_part_without_an_objective(page: Page) -> None:
    (shade,) = page.figure("frontier").with_class("s-guard")
    left, foot = (float(shade.attributes[k]) for k in ("x", "height"))
    foot += float(shade.attributes["y"])
    diamonds = [m for m in marks(page) if m.attributes["data-tip"].startswith("int4:")]
    assert len(diamonds) == 1
    assert "no load was offered" in diamonds[0].attributes["data-tip"]
    assert diamonds[0].attributes["class"] == "mark s-missed"
    x, y = _centre(diamonds[0])
    assert x > left
    assert y == pytest.approx(foot, abs=2)  # on the axis, below all that was measured
    assert all(
        _centre(m)[1] < y - 10 for m in marks(page) if "int4:" not in m.attributes["data-tip"]
    )
    data = {row["Method"]: row for row in rows_of(page, "Speed against quality")}
    assert data["int4"]["Outcome"] == "breaks quality_loss<1%"
    assert data["int4"]["Best objective"] == "–"


def test_the_frontier_only_rises_and_holds_no_point_that_another_beats(page: Page) -> None:
    (plot,) = page.figure("frontier").all("svg", class_="plot")
    (front,) = plot.all("path", class_="line s-front")
    steps = re.findall("([HV])([0-9.]+)", front.attributes["d"])
    across = [float(at) for direction, at in steps if direction == "H"]
    up = [float(at) for direction, at in steps if direction == "V"]
    assert len(up) >= 1
    assert all(a > b for a, b in pairwise(up[:-1]))  # pixels grow downwards
    assert across == sorted(across)


def test_each_point_is_the_best_trial_of_its_method(tmp_path: Path) -> None:
    folder, page = render(tmp_path, ["none", "int8"], guard=None)
    data = {row["Method"]: row for row in rows_of(page, "Speed against quality")}
    for method in ("none", "int8"):
        trials = [
            t for t in folder.read_trials() if t.objective and t.config["quantization"] == method
        ]
        met = [t for t in trials if t.slo_met] or trials
        best = max(met, key=lambda t: t.objective or 0.0)
        assert data[method]["Trial"] == str(best.number)
    assert "shaded" not in page.figure("frontier").one("figcaption").words
    assert speed_of({**DEFAULT, "quantization": "int8"}) > speed_of(DEFAULT)


def test_a_limit_on_kl_makes_it_the_axis(tmp_path: Path) -> None:
    _, page = render(tmp_path, ["none", "int8", "int4"], guard=("kl<0.02", 0.02))
    text = page.figure("frontier").words
    assert "KL divergence" in text
    assert "kl<0.02" in text


def test_one_method_has_no_frontier_but_a_row(tmp_path: Path) -> None:
    _, page = render(tmp_path, ["none"])
    assert not page.root.all("figure", aria_labelledby="caption-frontier")
    assert len(rows_of(page, "Quality of each way of quantizing")) == 1


def test_a_broken_method_does_not_press_the_others_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(HARM, "awq", (5.0, 3.0, 4))
    _, page = render(tmp_path, list(HARM))
    assert "awq → 500%" in page.figure("frontier").words
    places = {m.attributes["data-tip"].split(":")[0]: _centre(m)[0] for m in marks(page)}
    assert places["gptq"] - places["none"] > 100


@pytest.mark.parametrize("count", [2, 5, 9])
def test_labels_of_points_in_one_place_cover_neither_each_other_nor_the_marks(count: int) -> None:
    labels = [(300.0 + i, 150.0 + 2 * i, "method") for i in range(count)]
    placed = place_labels(labels, 60.0, 700.0, 20.0, 320.0)
    assert len({(x, y, anchor) for x, y, _, anchor in placed}) == count


def _centre(mark: Element) -> tuple[float, float]:
    if mark.tag == "circle":
        return float(mark.attributes["cx"]), float(mark.attributes["cy"])
    pairs = [
        tuple(map(float, p.split(" ")))
        for p in mark.attributes["d"].replace("Z", "").replace("M", "").split("L")
    ]
    xs, ys = zip(*pairs, strict=True)
    return (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2
