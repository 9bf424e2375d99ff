"""The page of a plan says what the plan says: what to get, at what price, and how sure that is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from autotune.errors import BadInput
from reports import render_report
from reports.formatting import size
from reports.plan.money import chance, dollars, prefixed
from tests.reports.page import Element, Page
from tests.reports.synthetic_plan import (
    CATALOGUE,
    GIB,
    MEMORY,
    OPTIONS,
    PRICE,
    TITLES,
    option,
    plan_json,
    unfit,
    write_plan,
)

SECTIONS = [
    "verdict",
    "options",
    "frontier",
    "memory",
    "growth",
    "sensitivity",
    "assumptions",
    "left-out",
    "all-options",
    "reproduce",
    "glossary",
]
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{7*7}}]]><!--\u202e\x00\ud800"


@pytest.fixture(scope="module")
def plan_page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return render(tmp_path_factory.mktemp("plan"))


def render(path: Path, **changes: Any) -> Page:
    return Page.read(render_report(write_plan(path, plan_json(**changes))))


def table_rows(element: Element) -> list[list[str]]:
    return [[cell.words for cell in row.children] for row in element.all("tr")]


def test_the_headline_says_what_to_get_its_price_and_the_chance(plan_page: Page) -> None:
    monthly = 9 * PRICE["l40s"] * 730
    assert plan_page.headline == (
        f"Get 9 × NVIDIA L40S 48 GB: ${monthly:,.0f} a month, 94% chance to keep the promise"
    )
    assert plan_page.badge == "✓ Expected to keep the promise"
    assert plan_page.verdict.with_class("price")[0].words == f"${monthly:,.0f}"
    lead = plan_page.verdict.with_class("lead")[0].words
    assert "Next: 4 × NVIDIA H100 SXM 80 GB for $7,271, 29% more." in lead
    assert "Cheaper, 7 × NVIDIA L40S 48 GB for $4,395, but 44% chance only." in lead


def test_what_was_not_measured_is_said_first(plan_page: Page, tmp_path: Path) -> None:
    (doubt,) = plan_page.verdict.with_class("doubt")
    assert doubt.words.startswith("Nothing was measured on NVIDIA L40S 48 GB")
    request = {**plan_json()["request"], "calibration": "runs/l40s"}
    assert not render(tmp_path, request=request).verdict.with_class("doubt")
    request |= {"calibrated_gpu": "h100-sxm"}
    assert render(tmp_path, request=request).verdict.with_class("doubt")


def test_each_limit_stands_beside_its_prediction(plan_page: Page, tmp_path: Path) -> None:
    (table,) = plan_page.verdict.with_class("slo")
    assert table_rows(table)[1:] == [
        ["ttft<500ms", "310 ms (217–403)", "186 ms (149–223)", "✓ kept 38% to spare"],
        ["tpot<50ms", "41 ms (35.3–46.7)", "32.8 ms (29.5–36.1)", "✓ kept 18% to spare"],
    ]
    measured = {"value": 0.045, "low": 0.04, "high": 0.055}
    limits = [{"limit": "tpot<50ms", "bound": 0.05, "measured": measured, "p": 0.75}]
    page = render(tmp_path, options=[{**OPTIONS[0], "limits": limits}])
    (table,) = page.verdict.with_class("slo")
    told = "△ likely its interval passes the limit; kept in 75% of the simulations"
    assert table_rows(table)[2] == ["tpot<50ms", "45 ms (40–55)", "32.8 ms (29.5–36.1)", told]


def test_the_best_of_each_gpu_is_ranked_with_the_choice_first(plan_page: Page) -> None:
    (table,) = plan_page.root.with_class("ranked")
    rows = table_rows(table)[1:]
    named = [row[0].split(",")[0] for row in rows]
    assert named[0].startswith("9 × NVIDIA L40S 48 GB recommended")
    assert [n.split(" × ")[-1].split(" GB")[0] for n in named[1:]] == [
        "NVIDIA H100 SXM 80",
        "NVIDIA A100 SXM 80",
        "NVIDIA H200 SXM 141",
        "NVIDIA T4 16",
    ]
    assert rows[-1][-1] == "does not fit5 GiB short on each GPU"  # a line break between


def test_all_options_can_be_sorted_and_filtered(plan_page: Page) -> None:
    table = plan_page.root.one("table", id="options-table")
    heads = [head.words for head in table.all("th")]
    rows = table.all("tbody")[0].all("tr")
    assert [row.attributes["id"] for row in rows] == [f"option-{i + 1}" for i in range(9)]
    outcomes = [row.attributes["data-outcome"] for row in rows]
    assert outcomes == ["met"] * 6 + ["missed"] * 2 + ["failed"]
    for made, row in zip(OPTIONS, rows, strict=True):
        key = row.children[heads.index("$ a month")].attributes["data-key"]
        assert key == ("" if made["usd_per_hour"] is None else repr(made["usd_per_hour"] * 730))
        assert len(row.children) == len(heads)
    filters = plan_page.root.one("fieldset").attributes["data-filter"]
    assert filters == table.attributes["id"]
    status = [e for e in plan_page.elements if e.attributes.get("data-status") == filters]
    assert len(status) == 1


def test_cheaper_options_stand_further_left_and_quicker_ones_lower(plan_page: Page) -> None:
    drawings = plan_page.figure("cost-frontier").all("svg", class_="plot")
    assert [d.with_class("panel-title")[0].words for d in drawings] == ["TTFT p95", "TPOT p95"]
    places = {}
    for mark in drawings[0].with_class("mark"):
        tip = mark.attributes.get("data-tip", "")
        match = re.match(r"[^:]+: \$([\d,]+) a month.* p95 (\d+)", tip)
        assert match
        x, y = position(mark)
        places[float(match[1].replace(",", "")), float(match[2])] = (x, y)
    assert len(places) == 8
    by_cost = sorted(places, key=lambda p: p[0])
    assert [places[p][0] for p in by_cost] == sorted(x for x, _ in places.values())
    by_latency = sorted(places, key=lambda p: -p[1])
    assert [places[p][1] for p in by_latency] == sorted(y for _, y in places.values())


def position(mark: Element) -> tuple[float, float]:
    if mark.tag == "circle":
        return float(mark.attributes["cx"]), float(mark.attributes["cy"])
    points = [
        (float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", mark.attributes["d"])
    ]
    xs = [x for x, _ in points]
    # A triangle's middle is not halfway up: its corners are 1.1 and 0.8 of its size off.
    top, foot = min(y for _, y in points), max(y for _, y in points)
    share = 1.21 / (1.21 + 0.88) if len(points) == 3 else 0.5
    return (min(xs) + max(xs)) / 2, top + share * (foot - top)


def test_the_frontier_holds_what_nothing_beats_and_keeps_the_promise(plan_page: Page) -> None:
    drawing = plan_page.figure("cost-frontier").all("svg", class_="plot")[0]
    (line,) = drawing.with_class("s-front")
    # A step down for each of three that are dearer and quicker than the one before.
    assert line.attributes["d"].count("V") == 4
    kept = [o for o in OPTIONS if o["feasible"] and o["fits"]]
    best, front = float("inf"), 0
    for made in sorted(kept, key=lambda o: o["usd_per_hour"]):
        if made["ttft"]["p95"]["value"] < best:
            best, front = made["ttft"]["p95"]["value"], front + 1
    assert front == 4


def test_memory_bars_sum_to_the_memory_and_tell_what_is_missing(plan_page: Page) -> None:
    chart = plan_page.figure("memory").parent
    assert chart is not None
    rows = table_rows(chart.one("details"))[1:]
    sums = {name: text for name, part, text in rows if part == "sum"}
    assert sums["9×l40s fp8"] == size(MEMORY["l40s"])
    parts = OPTIONS[0]["memory"]["parts"]
    told = {part: text for name, part, text in rows if name == "9×l40s fp8"}
    assert told["weights"] == size(parts["weights"])
    assert told["KV cache"] == size(parts["kv_cache"])
    assert ["t4", "missing", size(5 * GIB)] in rows
    drawing = plan_page.figure("memory").one("svg", class_="plot")
    assert "does not fit: 5 GiB short on each GPU" in drawing.words
    capacities = drawing.with_class("s-capacity")
    assert len(capacities) == 5
    missing = drawing.with_class("s-missing")[0].attributes
    edge = float(re.findall(r"M([\d.]+)", capacities[-1].attributes["d"])[0])
    assert float(missing["x"]) + float(missing["width"]) > edge


def test_growth_says_when_each_choice_is_outgrown(plan_page: Page, tmp_path: Path) -> None:
    section = plan_page.root.one("section", id="growth")
    assert "Growing 2× every 6 months, it is outgrown after 4.5 months" in section.words
    figure = plan_page.figure("growth")
    bars = [e for e in figure.with_class("bar") if "data-tip" in e.attributes]
    widths = {b.attributes["data-tip"].split(":")[0]: float(b.attributes["width"]) for b in bars}
    assert len(widths) == 4
    assert widths["9×l40s fp8"] / widths["4×h100-sxm fp8"] == pytest.approx(9 / 4, rel=0.01)
    lasting = {**OPTIONS[0], "outgrown": {"rate": 9000.0, "months": None}}
    page = render(tmp_path, options=[lasting, *OPTIONS[1:]])
    assert "lasts beyond what was looked at" in page.root.one("section", id="growth").words
    none = render(tmp_path, growth=[])
    assert "No growth was asked for" in none.root.one("section", id="growth").words


def test_sensitivity_tells_where_the_choice_flips(plan_page: Page) -> None:
    section = plan_page.root.one("section", id="sensitivity")
    rows = {row[0]: row for row in table_rows(section.one("details"))}
    assert rows["as planned"][1] == "$5,650 (9 replicas)"
    flipped = [name for name, row in rows.items() if row[-1] not in ("9×l40s fp8", "Cheapest")]
    assert flipped
    told = [p.words for p in section.all("p") if "would be the cheapest with" in p.words]
    for name in flipped:
        assert any(name in text for text in told)
    for name, row in rows.items():
        if name != "Case":
            costs = [float(cell.split(" ")[0].strip("$").replace(",", "")) for cell in row[1:5]]
            cheapest = rows["Case"][1 + costs.index(min(costs))]
            assert row[-1] == cheapest


def test_every_figure_has_its_source_and_date(plan_page: Page) -> None:
    sheets = plan_page.root.one("section", id="assumptions").with_class("sheet")
    assert len(sheets) == len(CATALOGUE)
    for sheet in sheets:
        for row in table_rows(sheet)[1:]:
            assert len(row) == 4
            assert all(row), row
    rows = {row[0]: row for row in table_rows(sheets[0])}
    assert rows["memory"][1:] == [
        "80 GiB",
        "vendor's data sheet example.com/sheet.pdf (read)",
        "2025-11-10",
    ]
    assert rows["price of an hour"][1] == "$2.49 ($1.99–$3.74)"
    assert rows["dense fp8 rate"][1] == "1.98 Pop/s"
    assert rows["step overhead"][1] == "300 (150–450) µs"
    assert rows["reached: bandwidth"][1] == "82% (74–90)"


def test_links_lead_to_sources_only_and_never_fetch(plan_page: Page) -> None:
    for element in plan_page.elements:
        assert element.tag not in {"link", "img", "iframe", "object", "embed", "base", "image"}
        assert not any(name.startswith("on") for name in element.attributes)
        href = element.attributes.get("href", "#")
        if not href.startswith("#"):
            assert element.tag == "a"
            assert href.startswith("https://example.com/")
            assert "noreferrer" in element.attributes["rel"]


def test_what_was_not_simulated_says_why(plan_page: Page, tmp_path: Path) -> None:
    told = dict(table_rows_of_facts(plan_page.root.one("section", id="left-out")))
    assert told["int8 on every GPU"] == "as fast as fp8 by the arithmetic"
    assert told["t4"] == "does not fit in the memory"
    screened = option("h100-sxm", "int4", 5, 0.3, 0.03, 0.9, method="arithmetic", reason="not near")
    page = render(tmp_path, options=[*OPTIONS, screened])
    told = dict(table_rows_of_facts(page.root.one("section", id="left-out")))
    assert told["h100-sxm int4"] == "not near"


def table_rows_of_facts(section: Element) -> list[tuple[str, str]]:
    return [(e.one("dt").words, e.one("dd").words) for e in section.all("div") if e.all("dt")]


def test_sections_and_figures_are_whole(plan_page: Page) -> None:
    assert [e.attributes["id"] for e in plan_page.root.all("section")] == SECTIONS
    ids = [e.attributes["id"] for e in plan_page.elements if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    for link in plan_page.root.one("nav").all("a"):
        assert link.attributes["href"][1:] in ids
    figures = plan_page.root.all("figure")
    assert len(figures) == 4
    for figure in figures:
        assert figure.parent is not None
        widths = {len(row.children) for row in figure.parent.one("details").all("tr")}
        assert len(widths) == 1
        for drawing in figure.all("svg", class_="plot"):
            _, _, width, height = map(float, drawing.attributes["viewbox"].split(" "))
            for mark in drawing.all("rect"):
                assert 0 <= float(mark.attributes["x"]) <= width
                assert 0 <= float(mark.attributes["y"]) <= height


def test_no_option_keeps_the_promise(tmp_path: Path) -> None:
    page = render(tmp_path, options=OPTIONS[6:], would_fit=["4 h200 would do"], growth=[])
    assert page.badge == "✗ No option keeps the promise"
    assert page.headline == (
        "No option keeps the promise with 90% chance; the closest is 7 × NVIDIA L40S 48 GB with 44%"
    )
    assert "4 h200 would do" in page.verdict.words


def test_a_promise_below_the_floor_has_nothing_to_get(tmp_path: Path) -> None:
    floor = "tpot<2ms is below the physical floor of 2.24 ms, set by reading 7.5 GB of weights"
    hopeless = option("h100-sxm", "fp8", 0, 1.0, 1.0, 0.0, reason=floor, usd_per_hour=None)
    hopeless |= {"ttft": None, "tpot": None, "normal": None, "outgrown": None}
    page = render(tmp_path, options=[hopeless], would_fit=["even alone"], growth=[])
    assert page.badge == "✗ No option keeps the promise"
    assert page.headline == "No number of these GPUs keeps the promise"
    (block,) = page.verdict.with_class("infeasible")
    assert f"NVIDIA H100 SXM 80 GB, fp8: {floor}" in block.words
    assert "even alone" in block.words
    assert not page.verdict.with_class("card")
    assert not page.verdict.with_class("slo")


def test_a_model_that_fits_nowhere_tells_the_nearest(tmp_path: Path) -> None:
    options = [unfit("t4", 5 * GIB), unfit("l40s", 3 * GIB)]
    page = render(tmp_path, options=options, would_fit=["2 l40s would hold it"], growth=[])
    assert page.headline == "The model fits on none of these GPUs"
    assert "NVIDIA L40S 48 GB, unquantized, is 3 GiB short on each GPU" in page.verdict.words
    assert "2 l40s would hold it" in page.verdict.words
    assert not page.verdict.with_class("price")


def test_a_plan_with_nothing_but_its_version_is_reported(tmp_path: Path) -> None:
    path = write_plan(tmp_path, {"schema_version": 1})
    page = Page.read(render_report(path))
    assert page.headline == "No option was looked at"
    assert [e.attributes["id"] for e in page.root.all("section")] == SECTIONS


def test_hostile_strings_are_text(plan_page: Page, tmp_path: Path) -> None:
    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poisoned(item) for key, item in value.items()} | {HOSTILE: HOSTILE}
        if isinstance(value, list):
            return [poisoned(item) for item in value] + [HOSTILE]
        return HOSTILE if isinstance(value, str) else value

    plan = {**poisoned(plan_json()), "schema_version": 1}
    for made in plan["options"][:2]:
        made |= {"usd_per_hour": 1e308, "replicas": 1e300, "p_meets_slo": 1e300}
    page = Page.read(render_report(write_plan(tmp_path, plan)))
    assert not page.root.all("img")
    assert len(page.root.all("script")) == len(plan_page.root.all("script"))
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08]", page.html)
    for element in page.elements:
        assert not any(name.startswith("on") for name in element.attributes)
        href = element.attributes.get("href", "#")
        assert href.startswith(("#", "https://example.com/")), href
    assert "<" not in page.root.one("script", id="plan-data").text


def test_numbers_of_any_size_keep_the_page_whole(tmp_path: Path) -> None:
    for value in (0.0, -1.0, 1e-300, 1e308, float("nan"), None, "x", [], {}):
        plan = plan_json()
        for made in plan["options"]:
            made |= {"usd_per_hour": value, "ttft": {"p95": value}, "memory": {"parts": value}}
            made |= {"intervals": value, "outgrown": {"months": value}}
        plan["sensitivity"][0]["options"] = [{"index": value, "usd_per_hour": value}]
        plan["growth"][0] = {"month": value, "rate": value, "options": [{"index": 0}]}
        plan["request"] |= {"rate": value, "workload": value, "growth": value}
        page = Page.read(render_report(write_plan(tmp_path, plan)))
        assert page.headline


def test_the_same_plan_gives_the_same_bytes(tmp_path: Path) -> None:
    first = render_report(write_plan(tmp_path, plan_json())).read_bytes()
    assert render_report(tmp_path).read_bytes() == first


def test_the_plan_stands_inside_its_page(plan_page: Page) -> None:
    assert json.loads(plan_page.root.one("script", id="plan-data").text) == plan_json()


def test_the_command_to_make_it_again_names_no_place(plan_page: Page) -> None:
    assert plan_page.root.one("pre", id="snippet-1").words == (
        "autotune plan --rate 50 --slo 'ttft<500ms,tpot<50ms'"
    )


def test_a_plan_of_another_release_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="schema version 7"):
        render_report(write_plan(tmp_path, {"schema_version": 7}))
    (tmp_path / "plan.json").write_text("[")
    with pytest.raises(BadInput, match="cannot be read"):
        render_report(tmp_path)


def test_money_chances_and_prefixes_are_written_plainly() -> None:
    assert [dollars(v) for v in (0.0042, 0.5, 12.345, 5649.6, None)] == [
        "$0.0042",
        "$0.50",
        "$12.35",
        "$5,650",
        "–",
    ]
    assert [chance(v) for v in (0.0, 0.004, 0.126, 0.9, 0.996, 1.0, None)] == [
        "under 1%",
        "under 1%",
        "13%",
        "90%",
        "over 99%",
        "over 99%",
        "–",
    ]
    assert prefixed(3.35e12, "B/s") == "3.35 TB/s"
    assert prefixed(None, "B/s") == "–"
    assert TITLES["l40s"] in plan_json()["catalogue"]["l40s"]["title"]
