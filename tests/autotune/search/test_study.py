from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from autotune.records import LimitResult, TrialRecord
from autotune.search.objective import Objective
from autotune.search.space import SearchSpace
from autotune.search.study import STUDY_NAME, Study, Suggestion, combined_improvements
from engine.config import EngineConfig

BASE = EngineConfig(model="m")
SPACE = SearchSpace(
    {
        "quantization": ("none", "int8", "int4"),
        "max_num_seqs": (4, 8, 16, 32, 64, 128, 256),
        "block_size": (8, 16, 32, 64, 128),
        "enable_prefix_caching": (True, False),
    }
)
OBJECTIVE = Objective("throughput")


def value_of(config: dict[str, object]) -> float:
    seqs = config["max_num_seqs"]
    assert isinstance(seqs, int)
    return 100.0 + 20 * (config["quantization"] == "int8") - abs(seqs - 64) / 8


def measured(number: int, suggestion: Suggestion) -> TrialRecord:
    config = {**BASE.to_dict(), **suggestion.point}
    crashed = suggestion.point["quantization"] == "int4"
    return TrialRecord(
        number=number,
        kind="search",
        source=suggestion.source,
        config=config,
        outcome="crash" if crashed else "ok",
        seconds=1.0,
        started_at="",
        objective=None if crashed else value_of(config),
        slo=[] if crashed else [LimitResult("ttft<1s", 0.5, 1.0, True, -0.5)],
    )


def search(
    folder: Path, records: list[TrialRecord], until: int
) -> tuple[Study[EngineConfig], list[TrialRecord]]:
    study = Study(folder / "study.journal", SPACE, OBJECTIVE, 7, records, BASE)
    for source, point in SPACE.seeds(BASE):
        study.enqueue(source, point)
    records = list(records)
    while len(records) < until:
        suggestion = study.ask()
        records.append(measured(len(records), suggestion))
        study.tell(suggestion, records[-1])
    return study, records


def test_default_comes_first_then_the_other_seeds_then_the_sampler(tmp_path: Path) -> None:
    _, records = search(tmp_path, [], 14)
    num_seeds = len(SPACE.seeds(BASE))
    assert records[0].source == "default"
    assert records[0].config == BASE.to_dict()
    assert {r.source for r in records[num_seeds:]} == {"sampler"}


@pytest.mark.parametrize("cut", [3, 11, 17])
def test_resumed_search_goes_on_as_the_uninterrupted_one(tmp_path: Path, cut: int) -> None:
    _, whole = search(tmp_path, [], 24)
    _, resumed = search(tmp_path, whole[:cut], 24)
    assert [r.config for r in resumed] == [r.config for r in whole]


def test_failed_trials_are_told_as_complete_and_infeasible(tmp_path: Path) -> None:
    search(tmp_path, [], 12)
    journal = JournalStorage(JournalFileBackend(str(tmp_path / "study.journal")))
    trials = optuna.load_study(study_name=STUDY_NAME, storage=journal).get_trials()
    assert {t.state for t in trials} <= {TrialState.COMPLETE, TrialState.WAITING}
    crashed = [t for t in trials if t.params.get("quantization") == "int4"]
    assert crashed
    assert all(t.constraints["outcome"] > 0 for t in crashed)


def test_sampler_learns_where_the_best_is(tmp_path: Path) -> None:
    _, records = search(tmp_path, [], 45)
    best = max((r for r in records if r.objective is not None), key=lambda r: r.objective or 0)
    assert best.config["quantization"] == "int8"
    assert best.config["max_num_seqs"] == 64


def test_importances_name_the_knobs_that_matter(tmp_path: Path) -> None:
    study, _ = search(tmp_path, [], 45)
    shares = study.importances()
    assert shares["quantization"] + shares["max_num_seqs"] > 0.6
    assert sum(shares.values()) == pytest.approx(1.0)


def test_importances_need_trials(tmp_path: Path) -> None:
    study, _ = search(tmp_path, [], 3)
    assert study.importances() == {}


def test_improvements_of_single_knobs_are_combined(tmp_path: Path) -> None:
    _, records = search(tmp_path, [], len(SPACE.seeds(BASE)))
    point = combined_improvements(records[0], records, SPACE, OBJECTIVE)
    assert point is not None
    assert point["quantization"] == "int8"
    assert point["max_num_seqs"] == 4  # the only other value among the seeds; 256 is the default
    assert point["block_size"] == BASE.block_size


def test_nothing_to_combine_when_one_knob_helped(tmp_path: Path) -> None:
    _, records = search(tmp_path, [], 3)
    assert combined_improvements(records[0], records, SPACE, OBJECTIVE) is None


DRAFTING = SearchSpace(
    {
        "speculative_method": ("none", "ngram"),
        "num_speculative_tokens": (2, 4, 8, 16),
        "prompt_lookup_max": (4, 8),
        "max_num_seqs": (64, 256),
    }
)


def drafted(number: int, point: Mapping[str, object], gain: float) -> TrialRecord:
    record = measured(number, Suggestion({"quantization": "none"}, "sampler", None))  # type: ignore[arg-type]
    brought = gain if point["speculative_method"] == "ngram" else 0.0
    config = {**BASE.to_dict(), **point}
    return dataclasses.replace(record, config=config, objective=100.0 + brought + number % 7 / 10)


def drafting_search(path: Path, records: list[TrialRecord], until: int) -> list[TrialRecord]:
    study = Study(path, DRAFTING, OBJECTIVE, 7, records, BASE)
    records = list(records)
    while len(records) < until:
        suggestion = study.ask()
        records.append(drafted(len(records), suggestion.point, 5.0))
        study.tell(suggestion, records[-1])
    return records


def test_what_is_drawn_for_idle_knobs_is_no_other_point(tmp_path: Path) -> None:
    whole = drafting_search(tmp_path / "whole", [], 20)
    idle = [r.config for r in whole if r.config["speculative_method"] == "none"]
    assert len(idle) > 3
    assert {c["num_speculative_tokens"] for c in idle} == {4}
    assert len({r.config["num_speculative_tokens"] for r in whole}) == 4
    # The sampler has learned what the records tell, and no more.
    resumed = drafting_search(tmp_path / "resumed", whole[:12], 20)
    assert [r.config for r in resumed] == [r.config for r in whole]


@pytest.mark.parametrize("gain", [50.0, -50.0])
def test_what_drafting_brings_is_the_methods_doing(tmp_path: Path, gain: float) -> None:
    rng = random.Random(3)
    points = [{n: rng.choice(v) for n, v in DRAFTING.values.items()} for _ in range(80)]
    records = [
        drafted(number, DRAFTING.normalised(point, BASE), gain)
        for number, point in enumerate(points)
    ]
    study = Study(tmp_path / "study.journal", DRAFTING, OBJECTIVE, 7, records, BASE)
    importances = study.importances()
    assert max(importances, key=importances.__getitem__) == "speculative_method"
    assert importances["speculative_method"] > 0.5
