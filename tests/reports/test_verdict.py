"""The verdict says what the records say, and no more."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from autotune.records import RunFolder
from reports import render_report
from reports.formatting import significant
from tests.reports.page import Page
from tests.reports.synthetic_run import DEFAULT, WINNER, add_trial, write_run

MET = [{"limit": "ttft<200ms", "measured": 0.1, "bound": 0.2, "met": True, "violation": -0.5}]


PROVEN = {"slo_met": True, "proven": True, "baseline_slo": MET}


def render(path: Path, **options: Any) -> Page:
    small = {"trials": 4, "rounds": 2, "requests": 30, **options}
    return Page.read(render_report(write_run(path, **small).path))


def look_up(folder: RunFolder, source: str) -> float:
    """Follow a place such as `result.slo[0].measured` or `trials[3].metrics.ttft.p95`."""
    trials = {t.number: t for t in folder.read_trials()}
    run = folder.read_run()
    first = re.fullmatch(r"trials\[(\d+)\]\.(\w+)(.*)", source)
    value: Any = run
    if first:
        value = getattr(trials[int(first[1])], first[2])
        source = first[3]
    for key, index in re.findall(r"(\w+)|\[(\d+)\]", source):
        if index:
            value = value[int(index)]
        else:
            value = value[key] if isinstance(value, dict) else getattr(value, key)
    return float(value)


def numbers(page: Page) -> dict[str, tuple[str, str]]:
    """(machine value, text) of each number in the verdict by its place in the records."""
    return {
        e.attributes["data-source"]: (e.attributes["value"], e.words)
        for e in page.verdict.all("data")
    }


def test_every_number_is_the_one_in_the_records(finished: RunFolder, page: Page) -> None:
    shown = numbers(page)
    assert {f"result.gain.{key}" for key in ("value", "low", "high")} <= shown.keys()
    assert {f"result.{side}[{i}].measured" for side in ("slo", "baseline_slo") for i in (0, 1)} <= (
        shown.keys()
    )
    for source, (value, text) in shown.items():
        recorded = look_up(finished, source)
        assert float(value) == recorded, source
        if source.startswith("result.gain"):
            assert text.rstrip("×") == f"{recorded:.2f}", source
        elif source.endswith(".measured"):
            assert text == f"{significant(recorded * 1000)} ms", source
        else:
            assert text == significant(recorded), source


def test_numbers_while_the_search_runs_are_those_of_the_trials(run_path: Path) -> None:
    page = render(run_path, finished=False, requests=60)
    shown = numbers(page)
    assert shown
    assert all(source.startswith("trials[") for source in shown)
    for source, (value, _) in shown.items():
        assert float(value) == look_up(RunFolder(run_path), source), source


def test_a_proven_winner_is_to_be_deployed(finished: RunFolder, page: Page) -> None:
    gain = finished.read_run()["result"]["gain"]
    assert page.badge == "✓ Proven"
    assert page.headline == f"Deploy this configuration: {gain['value']:.2f}× the default’s goodput"
    assert not page.verdict.with_class("doubt")
    assert "not proven" not in page.verdict.words.lower()


def test_changed_knobs_are_named_with_both_values(page: Page) -> None:
    (table,) = page.verdict.with_class("changes")
    rows = [[c.words for c in row.children] for row in table.all("tr")[1:]]
    assert rows == [
        [knob, str(DEFAULT[knob]), "→", str(WINNER[knob])]
        for knob in ("quantization", "block_size", "max_num_seqs")
    ]


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.95, 1.31, "includes 1"), (1.0, 1.31, "includes 1"), (0.81, 0.97, "shows a loss")],
)
def test_an_interval_that_does_not_exclude_one_is_not_proven(
    run_path: Path, low: float, high: float, said: str
) -> None:
    """Even where the run itself calls the gain proven."""
    gain = {"value": 1.12, "low": low, "high": high, "confidence": 0.9, "unit": "ratio"}
    page = render(run_path, result={"gain": gain, **PROVEN})
    assert page.badge == "△ Not proven"
    assert page.headline.startswith("Not proven")
    (doubt,) = page.verdict.with_class("doubt")
    assert doubt.words.startswith("Not proven: the 90% interval of the gain, ")
    assert said in doubt.words
    assert "Deploy" not in page.headline


def test_a_load_that_was_not_delivered_proves_nothing(run_path: Path) -> None:
    folder = write_run(run_path, trials=2, rounds=2, requests=30)
    run = folder.read_run()
    run["result"]["winner"] |= {"load_delivered": False, "load_note": "40 ms late at the median"}
    run["result"] |= {"slo_met": True, "proven": True}
    folder.write_json(folder.run_json, run)
    page = Page.read(render_report(run_path))
    assert page.badge == "△ Not proven"
    (doubt,) = page.verdict.with_class("doubt")
    assert "not delivered to the winner: 40 ms late at the median" in doubt.words


def test_a_run_that_doubts_its_own_gain_is_believed(run_path: Path) -> None:
    page = render(run_path, result={"slo_met": True, "proven": False, "baseline_slo": MET})
    assert page.badge == "△ Not proven"


def test_keeping_a_promise_that_the_default_breaks_is_worth_deploying(run_path: Path) -> None:
    """Also without a proven gain, which is still said to be none."""
    gain = {"value": 3.3, "low": 0.004, "high": 2697.0, "confidence": 0.95, "unit": "ratio"}
    broken = [{**MET[0], "measured": 0.4, "met": False, "violation": 1.0}]
    result = {"gain": gain, "slo_met": True, "proven": False, "slo": MET, "baseline_slo": broken}
    page = render(run_path, result=result)
    assert page.badge == "△ Gain not proven"
    assert page.headline == "Deploy this configuration: it met the SLO, the default did not"
    assert "0.00 to 2,697, includes 1" in page.verdict.with_class("doubt")[0].words


def test_a_gain_that_was_not_measured_is_not_shown(run_path: Path) -> None:
    """The search writes a confidence of 0 then."""
    gain = {"value": 1.0, "low": 1.0, "high": 1.0, "confidence": 0.0, "unit": "ratio"}
    result = {"gain": gain, "slo_met": True, "proven": False, "baseline_slo": MET}
    page = render(run_path, result=result)
    assert not page.verdict.with_class("gain")
    assert "not measured often enough" in page.verdict.with_class("doubt")[0].words


def test_nothing_better_keeps_the_default(run_path: Path) -> None:
    page = render(run_path, winner=None, result={"slo_met": True})
    assert page.headline == "Keep the default: nothing better was found"
    assert not page.verdict.with_class("gain")
    assert not page.verdict.with_class("changes")


def test_an_slo_that_nothing_meets_says_by_how_much(run_path: Path) -> None:
    missed = {"limit": "ttft<200ms", "measured": 0.25, "bound": 0.2, "met": False}
    met = {"limit": "p99(e2e)<=3s", "measured": 1.5, "bound": 3.0, "met": True}
    slo = [{**missed, "violation": 0.25}, {**met, "violation": -0.5}]
    empty = {**missed, "measured": None, "violation": 1000.0}
    page = render(
        run_path, result={"slo_met": False, "proven": False, "slo": slo, "baseline_slo": [empty]}
    )
    assert page.badge == "✗ SLO not met"
    (table,) = page.verdict.with_class("slo")
    rows = [[c.words for c in row.children] for row in table.all("tr")[1:]]
    assert rows == [
        ["ttft<200ms", "–", "✗ missed too many unfinished", "250 ms", "✗ missed by 25%"],
        ["p99(e2e)<=3s", "–", "–", "1,500 ms", "✓ met 50% to spare"],
    ]


def test_a_gain_as_difference_is_written_in_the_objectives_unit(run_path: Path) -> None:
    gain = {"value": 1.5, "low": 0.5, "high": 2.5, "confidence": 0.95, "unit": "difference"}
    page = render(run_path, result={"gain": gain, **PROVEN})
    assert page.badge == "✓ Proven"
    assert page.verdict.with_class("gain")[0].words == "+1.5 requests/s"
    gain |= {"low": -0.1}
    page = render(run_path, result={"gain": gain, **PROVEN})
    assert page.badge == "△ Not proven"
    assert "includes 0" in page.verdict.with_class("doubt")[0].words


def test_a_minimised_objective_is_not_called_a_multiple(run_path: Path) -> None:
    page = render(
        run_path,
        objective="latency",
        objective_unit="s",
        direction="minimize",
        result={"slo_met": True, "proven": True},
    )
    assert re.fullmatch(r"Deploy this configuration: \d+\.\d\d× better latency", page.headline)


def test_a_winner_that_misses_the_slo_while_searching_is_only_closest(run_path: Path) -> None:
    """With nothing feasible, the nearest miss is named as that."""
    folder = write_run(run_path, trials=1, requests=90, finished=False)
    add_trial(folder, 1, WINNER, 90, misses=9)
    page = Page.read(render_report(run_path))
    assert page.headline == "No configuration has met the SLO so far"
    assert "best so far" not in page.verdict.words.lower()
