"""From proof rounds to a decision, over records on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autotune.metrics import compute_metrics
from autotune.records import RequestRecord, RunFolder, TrialRecord
from autotune.search.objective import Objective
from autotune.search.proof import Contender, choose_finalists, judge
from autotune.search.verdict import changed_knobs, choose_winner, result_json
from autotune.slo import parse_slo
from engine.config import EngineConfig

DEFAULT = EngineConfig(model="m").to_dict()
FAST = {**DEFAULT, "quantization": "int8"}
SLOW = {**DEFAULT, "max_num_seqs": 4}
SLO = parse_slo("ttft<200ms")
OBJECTIVE = Objective("goodput")


def write_trial(
    folder: RunFolder,
    number: int,
    config: dict[str, Any],
    ttft: float,
    *,
    round_: int = 0,
    kind: Any = "proof",
    delivered: bool = True,
) -> TrialRecord:
    rng = np.random.default_rng(100 * round_ + number)
    records = []
    for i in range(40):
        sent = 0.1 * i
        first = sent + ttft * rng.lognormal(0, 0.3)
        records.append(
            RequestRecord(f"{i}", sent, sent, (first, first + 0.05), 10, 2, 2, "finished")
        )
    metrics = compute_metrics(
        records,
        SLO,
        duration=5.0,
        config=EngineConfig.from_mapping(config),
        load_delivered=delivered,
        load_note=None if delivered else "late",
        seed=0,
    )
    limits = SLO.evaluate(metrics)
    trial = TrialRecord(
        number=number,
        kind=kind,
        source="test",
        config=config,
        outcome="ok",
        seconds=1.0,
        started_at="",
        round=round_,
        metrics=metrics,
        slo=limits,
        slo_met=all(r.met for r in limits),
        objective=OBJECTIVE.value(metrics, SLO),
    )
    folder.append_trial(trial)
    folder.write_part(number, records, [])
    return trial


def proof(
    tmp_path: Path, ttfts: dict[str, float], rounds: int = 4, delivered: bool = True
) -> list[Contender]:
    """Judge rounds in which each config has a median TTFT."""
    folder = RunFolder(tmp_path)
    configs = {"default": DEFAULT, "fast": FAST, "slow": SLOW}
    trials = []
    for round_ in range(rounds):
        for name, ttft in ttfts.items():
            trials.append(
                write_trial(
                    folder, len(trials), configs[name], ttft, round_=round_, delivered=delivered
                )
            )
    return judge(
        folder,
        [configs[name] for name in ttfts],
        trials,
        slo=SLO,
        objective=OBJECTIVE,
        confidence=0.95,
        seed=0,
    )


def result(contenders: list[Contender]) -> dict[str, Any]:
    return result_json(contenders, OBJECTIVE, "requests/s", {}, [])


def test_clear_gain_is_proven_and_pools_the_rounds(tmp_path: Path) -> None:
    contenders = proof(tmp_path, {"default": 0.25, "fast": 0.05, "slow": 0.4})
    winner = choose_winner(contenders)
    assert winner.config == FAST
    assert winner.metrics is not None
    assert winner.metrics["completed"] == 160
    assert winner.metrics["duration_s"] == pytest.approx(20.0)
    answer = result(contenders)
    assert answer["proven"]
    assert answer["slo_met"]
    assert answer["changes"] == {"quantization": ["none", "int8"]}
    assert answer["gain"]["low"] > 1
    assert "meets the SLO" in answer["verdict"]
    assert [f["slo_met"] for f in answer["finalists"]] == [True, False]


def test_pooled_ttft_is_that_of_all_requests(tmp_path: Path) -> None:
    contenders = proof(tmp_path, {"default": 0.25, "fast": 0.05})
    folder = RunFolder(tmp_path)
    every = [
        r.ttft
        for t in folder.read_trials()
        if t.config == FAST
        for r in folder.read_requests(t.number)
    ]
    assert contenders[1].metrics is not None
    p95 = np.percentile([t for t in every if t is not None], 95)
    assert contenders[1].metrics["ttft"]["p95"] == pytest.approx(p95)


def test_equal_configs_keep_the_default(tmp_path: Path) -> None:
    answer = result(proof(tmp_path, {"default": 0.05, "fast": 0.05}))
    assert not answer["proven"]
    assert answer["changes"] == {}
    assert answer["verdict"].startswith("Keep the default")
    assert "--objective capacity" in answer["verdict"]


def test_keeping_the_promise_wins_over_goodput(tmp_path: Path) -> None:
    contenders = proof(tmp_path, {"default": 0.15, "fast": 0.05}, rounds=2)
    assert not contenders[0].slo_met
    assert contenders[1].slo_met
    assert choose_winner(contenders) is contenders[1]


def test_undelivered_load_gives_no_verdict(tmp_path: Path) -> None:
    answer = result(proof(tmp_path, {"default": 0.25, "fast": 0.05}, delivered=False))
    assert not answer["proven"]
    assert answer["verdict"].startswith("No verdict")


def test_failed_round_breaks_the_promise(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    trials = [write_trial(folder, i, DEFAULT, 0.25, round_=i) for i in range(2)]
    trials.append(write_trial(folder, 2, FAST, 0.05, round_=0))
    crashed = TrialRecord(
        number=3,
        kind="proof",
        source="test",
        config=FAST,
        outcome="crash",
        seconds=1.0,
        started_at="",
        round=1,
        reason="boom",
    )
    contenders = judge(
        folder,
        [DEFAULT, FAST],
        [*trials, crashed],
        slo=SLO,
        objective=OBJECTIVE,
        confidence=0.95,
        seed=0,
    )
    assert not contenders[1].slo_met
    assert contenders[1].gain is None
    assert choose_winner(contenders) is contenders[0]


def test_the_same_records_give_the_same_decision(tmp_path: Path) -> None:
    first = result(proof(tmp_path, {"default": 0.25, "fast": 0.05}))
    folder = RunFolder(tmp_path)
    again = judge(
        folder,
        [DEFAULT, FAST],
        folder.read_trials(),
        slo=SLO,
        objective=OBJECTIVE,
        confidence=0.95,
        seed=0,
    )
    assert result(again) == first


def test_finalists_are_the_best_that_met_the_slo_then_the_nearest(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    search = [
        write_trial(folder, 0, DEFAULT, 0.25, kind="search"),
        write_trial(folder, 1, SLOW, 0.5, kind="search"),
        write_trial(folder, 2, FAST, 0.05, kind="search"),
        write_trial(folder, 3, FAST, 0.05, kind="search"),
    ]
    finalists = choose_finalists(search, OBJECTIVE, 5, SLO)
    assert [t.config for t in finalists] == [FAST, SLOW]


def test_changed_knobs_tells_both_values() -> None:
    assert changed_knobs(DEFAULT, SLOW) == {"max_num_seqs": [256, 4]}
