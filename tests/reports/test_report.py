"""The report as a file: complete, self-contained, safe, small and the same every time."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

import reports
from autotune.errors import BadInput
from autotune.records import LimitResult, RunFolder, TrialRecord
from reports import render_report
from tests.reports.page import Element, Page
from tests.reports.synthetic_run import (
    DEFAULT,
    WINNER,
    add_trial,
    bench_of,
    requests_of,
    run_json,
    steps_of,
    write_run,
)

SECTIONS = [
    "verdict",
    "latencies",
    "rates",
    "quality",
    "profile",
    "speculation",
    "bottlenecks",
    "advice",
    "search",
    "all-trials",
    "engine",
    "workload",
    "environment",
    "reproduce",
    "glossary",
]
# Attributes by which a page may fetch, go elsewhere or run.
REACHING = {
    "src",
    "srcset",
    "href",
    "xlink:href",
    "action",
    "formaction",
    "data",
    "poster",
    "style",
}
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{7*7}}]]><!--\u202e\x00\ud800"


def render(path: Path, **options: Any) -> Page:
    small = {"trials": 3, "rounds": 2, "requests": 20, **options}
    return Page.read(render_report(write_run(path, **small).path))


def test_sections_stand_in_the_promised_order(page: Page) -> None:
    assert [e.attributes["id"] for e in page.root.all("section")] == SECTIONS
    contents = [a.attributes["href"] for a in page.root.one("nav").all("a")]
    assert contents == [f"#{name}" for name in SECTIONS]


def test_it_reaches_nothing_outside(page: Page) -> None:
    ids = {e.attributes["id"] for e in page.elements if "id" in e.attributes}
    for element in page.elements:
        assert element.tag not in {"link", "img", "iframe", "object", "embed", "base", "image"}
        assert not any(name.startswith("on") for name in element.attributes), element
        for name in REACHING & element.attributes.keys():
            target = element.attributes[name]
            assert name == "href", element
            assert target.startswith("#"), element
            assert target[1:] in ids, target
    style = page.root.one("style").text
    assert not re.search(r"url\(|@import|expression\(", style)
    script = page.root.all("script")[-1].text
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|WebSocket|innerHTML|eval\(", script)
    assert "http://" not in page.html
    assert "https://" not in page.html


def test_the_policy_admits_only_its_own_style_and_script(page: Page) -> None:
    (policy,) = [
        e.attributes["content"]
        for e in page.root.all("meta")
        if e.attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    for tag, rule in (("style", "style-src"), ("script", "script-src")):
        text = page.root.all(tag)[-1].text
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Page:
    path = tmp_path_factory.mktemp("hostile")
    model = {"name": HOSTILE, "path": HOSTILE, HOSTILE: HOSTILE, "parameters": 10**400}
    result = {
        "verdict": HOSTILE,
        "notes": [HOSTILE],
        "changes": {HOSTILE: [HOSTILE, HOSTILE]},
        "importances": {HOSTILE: 1e300},
        "finalists": [{"changes": {HOSTILE: [1, HOSTILE]}, "gain": {"value": 1e300}}],
        "slo": [{"limit": HOSTILE, "measured": 1e308, "bound": 1, "met": True, "violation": -1}],
        "quality": {HOSTILE: {HOSTILE: 1e-300}},
    }
    folder = write_run(
        path,
        trials=3,
        rounds=2,
        requests=20,
        model=model,
        command=["autotune", HOSTILE],
        hardware={"name": HOSTILE, "memory_bytes": 1e308},
        workload={"source": HOSTILE, "scaling": {HOSTILE: HOSTILE, "notes": [HOSTILE]}},
        objective=HOSTILE,
        objective_unit=HOSTILE,
        search_space={HOSTILE: [HOSTILE]},
        slo=HOSTILE,
        result=result,
    )
    failed = {**DEFAULT, "quantization": HOSTILE, HOSTILE: HOSTILE}
    folder.append_trial(
        TrialRecord(90, "search", HOSTILE, failed, "crash", 1e300, HOSTILE, reason=HOSTILE)
    )
    folder.append_trial(
        TrialRecord(
            91, "search", "tpe", WINNER, "ok", 1.0, "", metrics={"ttft": 3}, objective=1e308
        )
    )
    for number, loss in enumerate((1e308, -1e308, 0.1, "x", None), 92):
        quality = {"variant": HOSTILE * number, "quality_loss": loss, "kl_low": HOSTILE}
        slo = [LimitResult("quality_loss<1%" + HOSTILE, None, 1e308, False, 1e308)]
        folder.append_trial(
            TrialRecord(
                number, "search", "tpe", WINNER, "quality", 1.0, "", quality=quality, slo=slo
            )
        )
    folder.deploy.mkdir()
    (folder.deploy / "engine.yaml").write_text(HOSTILE, "utf-8", "replace")
    return Page.read(render_report(path))


def test_hostile_strings_are_text(hostile: Page, page: Page) -> None:
    assert not hostile.root.all("img")
    assert len(hostile.root.all("script")) == len(page.root.all("script"))
    for element in hostile.elements:
        assert "onerror" not in element.attributes
    assert "<script>alert(1)</script>" in hostile.root.all("b")[0].words
    assert "{{7*7}}" in hostile.root.all("b")[0].words
    assert "49" not in hostile.root.all("b")[0].words


def test_no_character_turns_the_direction_of_the_verdict(hostile: Page) -> None:
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08]", hostile.html)


def test_the_embedded_run_is_the_run(finished: RunFolder, page: Page, hostile: Page) -> None:
    assert page.embedded_run() == finished.read_run()
    assert hostile.embedded_run()["model"]["name"] == HOSTILE
    # "<" inside the script would let a string end it.
    assert "<" not in hostile.root.one("script", id="run-data").text


def test_numbers_that_json_has_not_are_embedded_as_null(run_path: Path) -> None:
    folder = write_run(run_path, trials=1, finished=False, requests=5)
    run = {**run_json(), "budget_s": float("nan"), "seeds": {"seed": [float("inf")]}}
    folder.run_json.write_text(json.dumps(run))
    page = Page.read(render_report(run_path))
    assert page.embedded_run()["budget_s"] is None
    assert page.embedded_run()["seeds"] == {"seed": [None]}


def test_charts_have_a_name_a_caption_and_their_data(page: Page) -> None:
    figures = page.root.all("figure")
    assert len(figures) == 9
    for figure in figures:
        assert figure.attributes["role"] == "img"
        caption = figure.one("figcaption")
        assert caption.attributes["id"] == figure.attributes["aria-labelledby"]
        assert len(caption.words) > 40
        assert figure.parent is not None
        table = figure.parent.one("details").one("table")
        widths = {len(row.children) for row in table.all("tr")}
        assert len(widths) == 1
        assert len(table.all("tr")) > 1
        for drawing in figure.all("svg", class_="plot"):
            assert [t for t in drawing.all("text") if t.attributes.get("class") == "tick"]


def test_the_room_imports_only_the_records_of_the_product() -> None:
    imported = set()
    for file in Path(reports.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {name.name for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module or "")
    ours = {name for name in imported if name.split(".")[0] in {"autotune", "engine", "kernels"}}
    assert ours == {"autotune.records"}


def test_ids_are_unique(page: Page) -> None:
    ids = [e.attributes["id"] for e in page.elements if "id" in e.attributes]
    assert len(ids) == len(set(ids))


def rows_of(page: Page) -> list[Element]:
    return page.root.one("table", id="trials").all("tbody")[0].all("tr")


def test_the_trial_table_can_be_sorted_and_filtered(finished: RunFolder, page: Page) -> None:
    table = page.root.one("table", id="trials")
    heads = table.all("th")
    for index, head in enumerate(heads):
        assert head.one("button", type="button").attributes["data-column"] == str(index)
    trials = finished.read_trials()
    rows = rows_of(page)
    assert [row.attributes["id"] for row in rows] == [f"trial-{t.number}" for t in trials]
    names = [head.words for head in heads]
    objective = names.index("goodput (requests/s)")
    for trial, row in zip(trials, rows, strict=True):
        assert len(row.children) == len(heads)
        assert all("data-key" in cell.attributes for cell in row.children)
        key = row.children[objective].attributes["data-key"]
        assert key == ("" if trial.objective is None else repr(trial.objective))
        failed, met = trial.outcome != "ok", trial.slo_met
        assert row.attributes["data-outcome"] == (
            "failed" if failed else "met" if met else "missed"
        )
        assert row.children[-1].words == (trial.reason or "")
    for knob in ("quantization", "max_num_seqs", "scheduling_policy"):
        assert knob in names
    assert "kv_cache_memory_bytes" not in names  # it never varied
    offered = {e.attributes["value"] for e in page.root.all("input", name="filter")}
    assert offered == {"all", "met", "missed", "failed", "proof"}
    script = page.root.all("script")[-1].text
    for hook in (
        "table.sortable",
        "data-column",
        "aria-sort",
        "dataset.key",
        '[data-filter="${table.id}"]',
    ):
        assert hook in script


def test_copy_buttons_name_what_they_copy(page: Page) -> None:
    ids = {e.attributes["id"]: e for e in page.elements if "id" in e.attributes}
    copied = [e.attributes["data-copy"] for e in page.elements if "data-copy" in e.attributes]
    assert copied == ["snippet-1", "snippet-2", "run-data"]
    command = ids["snippet-1"].words
    assert command == "autotune run --slo 'ttft<200ms,tpot<100ms' --budget 4m"
    assert ids["snippet-2"].words == "quantization: int8 # <chosen>"


def test_the_same_records_give_the_same_bytes(finished: RunFolder) -> None:
    first = finished.report_html.read_bytes()
    assert render_report(finished.path) == finished.report_html
    assert finished.report_html.read_bytes() == first
    assert not list(finished.path.glob(".report*"))


def test_thousands_of_trials_stay_below_two_megabytes(run_path: Path) -> None:
    folder = write_run(run_path, trials=1, rounds=2, requests=400)
    line = folder.trials_jsonl.read_text().splitlines()[0]
    trial = json.loads(line)
    configs = [
        {**WINNER, "max_num_seqs": n % 97 + 1, "block_size": 8 << n % 4} for n in range(1100)
    ]
    with folder.trials_jsonl.open("a") as file:
        for number, config in enumerate(configs, start=100):
            reason = "x" * 2000
            file.write(json.dumps({**trial, "number": number, "config": config, "reason": reason}))
            file.write("\n")
    page = Page.read(render_report(run_path))
    assert folder.report_html.stat().st_size < 2_000_000
    count = len(folder.read_trials())
    assert count > 1100
    assert f"{count - len(rows_of(page))} of {count} trials are left out" in page.root.words


@pytest.mark.parametrize("status", ["running", "interrupted", "done"])
@pytest.mark.parametrize("trials", [0, 1, 4])
def test_a_run_without_a_result_is_reported(run_path: Path, status: str, trials: int) -> None:
    page = render(run_path, trials=trials, finished=False, status=status)
    word = {"running": "Still running", "interrupted": "Interrupted", "done": "No result"}[status]
    assert word in page.badge
    assert [e.attributes["id"] for e in page.root.all("section")] == SECTIONS
    assert not page.verdict.with_class("gain")
    assert page.headline == "No trial has finished yet" if trials == 0 else page.headline
    assert ("Not proven" in page.verdict.words) == (trials > 0)


def test_only_failed_trials_are_reported_with_their_reasons(run_path: Path) -> None:
    folder = write_run(run_path, trials=0, finished=False)
    for number, outcome in enumerate(["out_of_memory", "out_of_memory", "crash", "timeout"]):
        folder.append_trial(
            TrialRecord(
                number,
                "search",
                "tpe",
                DEFAULT,
                outcome,
                3.0,
                "",
                reason=f"why {number}",  # type: ignore[arg-type]
            )
        )
    page = Page.read(render_report(run_path))
    assert page.headline == "Nothing could be measured"
    assert "All 4 trials failed (2 out of memory, 1 crash, 1 timeout)" in page.verdict.words
    assert [row.children[-1].words for row in rows_of(page)] == [f"why {n}" for n in range(4)]
    assert len(page.figure("history").with_class("s-failed")) == 4 + 1  # and one in the legend


def test_of_another_engine_it_says_why_there_is_no_profile(run_path: Path) -> None:
    page = render(run_path, trials=2, rounds=2, requests=20, engine={"title": "vLLM"})
    for section in ("profile", "bottlenecks", "advice"):
        assert "vLLM" in page.root.one("section", id=section).words


def test_one_request_is_reported(run_path: Path) -> None:
    page = render(run_path, trials=1, rounds=1, requests=1)
    assert "1 request" in page.figure("latency").words


def test_a_run_whose_requests_all_failed_is_reported(run_path: Path) -> None:
    folder = write_run(run_path, trials=0, finished=False)
    trial = add_trial(folder, 0, DEFAULT, 6, misses=6)
    assert trial.metrics is not None
    assert trial.metrics["ttft"]["p95"] is None
    page = Page.read(render_report(run_path))
    assert "✗ missed" in page.verdict.words
    assert "none finished" in page.verdict.words


def test_a_torn_trial_line_and_missing_records_do_not_matter(run_path: Path) -> None:
    folder = write_run(run_path, trials=3, rounds=2, requests=10)
    with folder.trials_jsonl.open("a") as file:
        file.write('{"number": 99, "ki')
    folder.requests_parquet.unlink()
    folder.steps_parquet.unlink()
    page = Page.read(render_report(run_path))
    assert "No request records were kept" in page.root.words
    assert "No step records were kept" in page.root.words


def test_a_run_json_with_nothing_but_its_version_is_reported(run_path: Path) -> None:
    run_path.mkdir()
    RunFolder(run_path).run_json.write_text('{"schema_version": 1}')
    assert Page.read(render_report(run_path)).headline == "No trial has finished yet"


def test_a_bench_folder_is_reported_as_one_measurement(run_path: Path) -> None:
    records = requests_of(1.0, 20, seed=1)
    run_path.mkdir()
    folder = RunFolder(run_path)
    folder.write_part(0, records, steps_of(records, 1))
    folder.merge_parts()
    folder.write_json(run_path / "bench.json", bench_of(records, DEFAULT))
    folder.write_json(folder.run_json, run_json(kind="bench", status="done"))
    page = Page.read(render_report(run_path))
    assert page.headline == "One configuration, measured under load"
    assert "measured, 20 requests" in page.figure("latency").words
    assert page.figure("timeline")


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no run"):
        render_report(tmp_path)
