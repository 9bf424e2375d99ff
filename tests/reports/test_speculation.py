"""The section on speculation: who drafted, what was accepted, what it was worth by load."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from autotune.profiling.evidence import LoadEvidence
from autotune.profiling.speculation_measured import measured_speculation
from autotune.records import RunFolder, TrialRecord
from autotune.speculation_counts import speculation_metrics
from engine.config import EngineConfig
from reports import render_report
from reports.charts.acceptance import acceptance_by_position
from reports.charts.speculative_gain import speculative_gain
from reports.evidence import read_evidence
from reports.report import report_page
from reports.speculation import drafts_table, how_drafted, read_drafts
from reports.trials import trial_table
from reports.with_and_without import PAIR_COLUMNS, pair_rows, with_and_without
from tests.autotune.drafted_steps import drafted_load
from tests.autotune.profiling.loads import LinearCost
from tests.reports.page import Page
from tests.reports.synthetic_profile import PROFILE, write_profile_files
from tests.reports.synthetic_run import DEFAULT, bench_of, predicted_of, requests_of, run_json

CONFIG = EngineConfig(model="test", speculative_method="ngram", num_speculative_tokens=4)
STEPS = [
    step
    for batch in (1, 2, 4, 8)
    for step in drafted_load(
        1500, k=4, chance=0.7, hit=0.4, batch=lambda _, n=batch: n, row=1e-3, seed=batch
    )
]
COST = LinearCost(step=10e-3, row=1e-3, kv_token=0, pair=0, overhead=0, host=0)
NGRAM = {"speculative_method": "ngram", "num_speculative_tokens": 4, "speculative_adaptive": True}
DRY_RUN = {
    "num_requests": 30,
    "tokens_per_step": {"2": 1.4, "4": 1.6},
    "hit_share": 0.45,
    "positions": [{"position": i + 1, "drafted": 900, "accepted": 700 - 150 * i} for i in range(4)],
    "loads": [
        {
            "sequences": n,
            "num_tokens": 4 if n < 8 else 0,
            "tokens_per_step": 1.6,
            "predicted": {"value": max(1.0, 1.5 - 0.1 * n), "low": 0.9, "high": 1.7 - 0.1 * n},
        }
        for n in (1, 2, 4, 8, 16)
    ],
}


def bench(**changes: Any) -> dict[str, Any]:
    found = bench_of(requests_of(2.0, 40, 3), {**DEFAULT, **NGRAM})
    return {**found, "speculation": speculation_metrics(STEPS, CONFIG), **changes}


def bench_folder(path: Path, metrics: dict[str, Any]) -> RunFolder:
    folder = RunFolder(path)
    folder.write_json(folder.run_json, run_json(kind="bench", engine_config={**DEFAULT, **NGRAM}))
    folder.write_json(path / "bench.json", metrics)
    return folder


def profile_folder(path: Path) -> RunFolder:
    measured, _ = measured_speculation(LoadEvidence([], STEPS), CONFIG, COST, 0.08)
    assert measured is not None
    profile = copy.deepcopy(PROFILE)
    profile["measured_speculation"] = measured.model_dump(mode="json")
    profile["speculation"] = DRY_RUN
    profile["metrics"] = bench()
    folder = RunFolder(path)
    folder.write_json(folder.run_json, run_json(kind="profile", engine_config={**DEFAULT, **NGRAM}))
    write_profile_files(path, profile)
    return folder


def section(folder: RunFolder) -> Any:
    return Page.read(render_report(folder.path)).root.one("section", id="speculation")


def test_a_bench_that_drafted_shows_what_was_accepted_and_what_it_was_worth(tmp_path: Path) -> None:
    folder = bench_folder(tmp_path, bench())
    shown = section(folder)
    (drafts,) = read_drafts(read_evidence(folder.path))
    facts = speculation_metrics(STEPS, CONFIG)
    assert facts is not None
    assert len(drafts.positions) == 4
    for position, told in zip(drafts.positions, facts["positions"], strict=True):
        assert (position.share.low, position.share.high) == (
            told["share"]["low"],
            told["share"]["high"],
        )
    captions = [e.text for e in shown.all("figcaption")]
    assert captions[0].startswith("Acceptance by position.")
    assert captions[1].startswith("Speed-up by load.")
    assert "ngram, 4" in shown.text
    columns, rows = drafts_table([drafts])
    assert columns == ["Quantity", "measured"]
    told = {row[0]: row[1] for row in rows}
    assert told["Accepted tokens"] == f"{facts['accepted_tokens']:,}"


def test_each_load_is_drawn_as_measured_and_as_predicted(tmp_path: Path) -> None:
    folder = profile_folder(tmp_path)
    drafts = read_drafts(read_evidence(folder.path))
    assert [(d.label, d.measured) for d in drafts] == [("measured", True), ("dry run", False)]
    figure = speculative_gain(drafts)
    assert figure is not None
    titles = [row[0] for row in figure.rows]
    assert titles.count("measured") == titles.count("predicted") == 4
    assert titles.count("dry run, predicted") == 5
    by_title = {(row[0], row[1]): row for row in figure.rows}
    for n in ("1", "2", "4"):
        measured, predicted = (by_title[title, n][4] for title in ("measured", "predicted"))
        assert float(measured.split()[0]) == pytest.approx(float(predicted.split()[0]), rel=0.1)
    assert by_title["dry run, predicted", "16"][2] == "0"
    assert "no gain" in figure.drawings[0]


def test_a_run_of_another_config_still_shows_the_dry_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_json(folder.run_json, run_json())
    write_profile_files(tmp_path, {**PROFILE, "speculation": DRY_RUN})
    shown = section(folder)
    assert "Prompt lookup, dry run" in shown.text
    assert "45%" in shown.text
    assert len(shown.all("figure")) == 2


def test_where_nothing_is_known_the_section_says_so(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_json(folder.run_json, run_json())
    shown = section(folder)
    assert "No configuration drafted tokens" in shown.text
    assert acceptance_by_position([]) is None
    assert speculative_gain([]) is None


def test_positions_of_an_earlier_release_have_no_interval(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_json(folder.run_json, run_json())
    write_profile_files(tmp_path, {**PROFILE, "speculation": DRY_RUN})
    figure = acceptance_by_position(read_drafts(read_evidence(tmp_path)))
    assert figure is not None
    assert figure.rows[0] == ["dry run: prompt lookup", "1", "900", "700", "77.8%"]
    assert "whisker" not in figure.drawings[0]


def trial(number: int, tpot: float, drafts: dict[str, Any], **changes: Any) -> TrialRecord:
    metrics = bench_of(requests_of(1.0, 20, 1), DEFAULT)
    metrics["tpot"]["mean"] = tpot
    if drafts.get("speculative_method", "none") != "none":
        metrics["speculation"] = speculation_metrics(STEPS[:300], CONFIG)
    values: dict[str, Any] = {
        "number": number,
        "kind": "search",
        "source": "sampler",
        "config": {**DEFAULT, "speculative_method": "none", "num_speculative_tokens": 4, **drafts},
        "outcome": "ok",
        "seconds": 1.0,
        "started_at": "2026-01-01T00:00:00+00:00",
        "rate": 4.0,
        "metrics": metrics,
        "slo_met": True,
        "objective": 1.0,
    }
    return TrialRecord(**(values | changes))


def search(path: Path, *trials: TrialRecord) -> RunFolder:
    folder = RunFolder(path)
    for record in trials:
        folder.append_trial(record)
    folder.write_json(folder.run_json, run_json())
    return folder


def test_trials_that_differ_in_drafts_alone_stand_beside_each_other(tmp_path: Path) -> None:
    folder = search(
        tmp_path,
        trial(0, 0.02, {}),
        trial(1, 0.012, NGRAM),
        trial(2, 0.010, {**NGRAM, "max_num_seqs": 8}),  # another knob
        trial(3, 0.010, NGRAM, rate=9.0),  # another rate
        trial(4, 0.016, {**NGRAM, "speculative_adaptive": False, "num_speculative_tokens": 8}),
        trial(5, 0.016, NGRAM, metrics=None, outcome="crash"),
    )
    evidence = read_evidence(folder.path)
    pairs = with_and_without(evidence)
    assert [(p.plain.number, p.drafting.number) for p in pairs] == [(0, 1), (0, 4)]
    assert [p.measured for p in pairs] == pytest.approx([0.02 / 0.012, 0.02 / 0.016])
    rows = pair_rows(pairs)
    assert rows[0] == ["0, 1", "ngram, 4", "4", "20 ms", "12 ms", "1.67", "–"]
    assert rows[1][1] == "ngram, 8 always"
    assert len(rows[0]) == len(PAIR_COLUMNS)
    assert "With and without drafts" in section(folder).text


def test_a_predicted_speedup_carries_bounds_that_hold_both(tmp_path: Path) -> None:
    plain, drafting = trial(0, 0.02, {}), trial(1, 0.012, NGRAM)
    told = [
        TrialRecord(
            **{
                **{name: getattr(t, name) for name in TrialRecord.__slots__},
                "predicted": predicted_of(t.metrics or {}, off),
            }
        )
        for t, off in ((plain, 0.0), (drafting, 0.05))
    ]
    (pair,) = with_and_without(read_evidence(search(tmp_path, *told).path))
    assert pair.predicted is not None
    assert pair.predicted.value == pytest.approx(0.02 / 0.012 / 1.05)
    assert pair.predicted.low == pytest.approx(pair.predicted.value * 0.9 / 1.1)
    assert pair.predicted.high == pytest.approx(pair.predicted.value * 1.1 / 0.9)


def test_the_trials_table_tells_method_and_number_in_one_column(tmp_path: Path) -> None:
    folder = search(
        tmp_path,
        trial(0, 0.02, {}),
        trial(1, 0.012, NGRAM),
        trial(2, 0.012, {**NGRAM, "num_speculative_tokens": 2, "max_num_seqs": 8}),
    )
    table = trial_table(read_evidence(folder.path))
    names = [name for name, _ in table.columns]
    assert "speculative_method" not in names
    assert "num_speculative_tokens" not in names
    assert "max_num_seqs" in names
    drafts, tokens = names.index("drafts"), names.index("Tokens a step")
    assert [row.cells[drafts].text for row in table.rows] == ["none", "ngram, 4", "ngram, 2"]
    assert [bool(row.cells[tokens].text) for row in table.rows] == [False, True, True]
    assert all(len(row.cells) == len(names) for row in table.rows)


def test_how_drafted() -> None:
    assert how_drafted({}) == ""
    assert how_drafted({"speculative_method": "none", "num_speculative_tokens": 4}) == "none"
    assert how_drafted({"speculative_method": "draft_model"}) == "draft model"


@pytest.mark.parametrize(
    "damage",
    [
        None,
        [],
        {"positions": 3, "loads": "x"},
        {"positions": [None, {"position": 1, "drafted": 0}, {"position": "<b>"}]},
        {"positions": [{"position": 1, "drafted": 3, "accepted": 1, "share": {"low": 5}}]},
        {"loads": [{"sequences": 0, "num_tokens": 1, "tokens_per_step": 1}]},
        {
            "loads": [
                {
                    "sequences": 1e300,
                    "num_tokens": 1,
                    "tokens_per_step": 1,
                    "measured": {"value": 1e300},
                }
            ]
        },
        {"tokens_per_step": {"value": "<script>", "low": None}},
    ],
)
def test_damaged_records_leave_a_page(tmp_path: Path, damage: Any) -> None:
    folder = bench_folder(tmp_path, bench(speculation=damage))
    profile = {**PROFILE, "speculation": damage, "measured_speculation": damage}
    (tmp_path / "profile.json").write_text(json.dumps(profile))
    page = report_page(read_evidence(folder.path))
    assert "<script>" not in page.split('id="speculation"')[1].split("</section>")[0]
