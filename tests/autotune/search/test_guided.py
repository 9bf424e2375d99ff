"""The search that chooses its trials by forecast, over an engine whose costs are known."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autotune.errors import Interrupted
from autotune.predict.drafting import DraftCost, DraftProfile
from autotune.records import RunFolder, TrialRecord
from autotune.search import prepare
from autotune.search.events import Silent
from autotune.search.messages import Failed, MeasureCommand
from autotune.search.methods_offered import Offer
from autotune.search.options import TuneOptions
from autotune.search.tune import tune
from autotune.traffic_options import TrafficOptions
from engine.config import KNOBS, EngineConfig
from tests.autotune.search.virtual_trials import VirtualTrials, truth

SEARCHED: dict[str, list[Any]] = {
    "quantization": ["none", "int8", "int4"],
    "kv_cache_dtype": ["auto", "int8"],
    "max_num_seqs": [1, 2, 4, 8, 16, 64],
    "max_num_batched_tokens": [64, 128, 256, 1024],
}
# Where few points will do.
FEW: dict[str, list[Any]] = {
    "quantization": ["none", "int8", "int4"],
    "kv_cache_dtype": ["auto"],
    "max_num_seqs": [2, 8, 64],
    "max_num_batched_tokens": [128, 1024],
}
FIXED: dict[str, list[Any]] = {
    "block_size": [16],
    "long_prefill_token_threshold": [0],
    "enable_prefix_caching": [True],
    "scheduling_policy": ["fcfs"],
    "watermark": [0.0],
    "speculative_method": ["none"],
}


@pytest.fixture(autouse=True, scope="module")
def everything_is_offered() -> Iterator[None]:
    values = {name: KNOBS[name].choices or () for name in ("quantization", "kv_cache_dtype")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "offer_for", lambda _, quantized: Offer(values, quantized))
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, everything_is_offered: None) -> Path:
    """A run that nothing interrupted; tests only read it."""
    path = tmp_path_factory.mktemp("whole") / "out"
    run(path, options())
    return path


def options(**changes: Any) -> TuneOptions:
    settings: dict[str, Any] = {
        "config": {"device": "cpu", "max_num_seqs": 64, "max_num_batched_tokens": 1024},
        "traffic": TrafficOptions(source="chat", rate=math.inf, length_factor=0.1, requests=24),
        "slo": "tpot<12ms",
        "objective": "throughput",
        "budget_s": None,
        "trials": 7,
        "rounds": 2,
        "finalists": 1,
        "advice": False,
        "narrowing": {**FEW, **FIXED},
    }
    return TuneOptions(**{**settings, **changes})


def searched(path: Path) -> list[TrialRecord]:
    return [t for t in RunFolder(path).read_trials() if t.kind == "search"]


def run(path: Path, asked: TuneOptions | None, **engine: Any) -> dict[str, Any]:
    evaluator = VirtualTrials(path, **engine)
    return tune(asked, path, evaluator=evaluator, clock=evaluator.clock)


def test_a_few_trials_come_near_the_best_of_the_space(tmp_path: Path) -> None:
    # The probes take int4 for the fastest; it is not.
    engine: dict[str, Any] = {"slower": {"int4": 1.8, "int8": 1.1}}
    path = tmp_path / "out"
    run(path, options(narrowing={**SEARCHED, **FIXED}), **engine)
    records = searched(path)
    command = MeasureCommand(99, {}, 0, 1.0, 60.0, 0, options().slo)
    base = EngineConfig.from_mapping(records[0].config)
    configs = [
        base.replace(**dict(zip(SEARCHED, values, strict=True)))
        for values in itertools.product(*SEARCHED.values())
        if values[2] <= values[3]
    ]
    all_metrics = truth(VirtualTrials(path, **engine), configs, command)
    best = max(
        m["output_tokens_per_s"]  # type: ignore[type-var]
        for m in all_metrics
        if m["slo_statistics"]["p95(tpot)"] < 0.012  # type: ignore[index]
    )
    reached = max(t.objective for t in records if t.slo_met and t.objective is not None)
    assert reached > 0.98 * best  # type: ignore[operator]
    assert len(records) == 7 < len(configs) / 10


@pytest.mark.parametrize(("chance", "method"), [(0.9, "ngram"), (0.05, "none")])
def test_drafts_are_chosen_where_they_pay(tmp_path: Path, chance: float, method: str) -> None:
    """What is accepted is guessed at before a trial drafts, and known from then on."""
    space: dict[str, list[Any]] = {
        "quantization": ["none"],
        "kv_cache_dtype": ["auto"],
        "max_num_seqs": [1, 2, 8],
        "max_num_batched_tokens": [128],
        "speculative_method": ["none", "ngram"],
        "num_speculative_tokens": [1, 3, 7],
        "speculative_adaptive": [False],
        "prompt_lookup_max": [4],
    }
    drafts = {"ngram": DraftProfile((chance,), share=0.9, cost=DraftCost(2e-4, 1e-4))}
    asked = options(
        config={
            "device": "cpu",
            "max_num_seqs": 8,
            "max_num_batched_tokens": 128,
            "speculative_adaptive": False,
        },
        traffic=TrafficOptions(source="chat", rate=1.0, length_factor=0.1, requests=24),
        slo="tpot<1s",
        objective="latency",
        narrowing={**FIXED, **space},
    )
    run(tmp_path / "out", asked, drafts=drafts)
    records = searched(tmp_path / "out")
    best = min((t for t in records if t.objective is not None), key=lambda t: t.objective or 0.0)
    assert best.config["speculative_method"] == method
    assert {t.config["speculative_method"] for t in records} == {"none", "ngram"}
    told = [t for t in records[1:] if t.config["speculative_method"] == "ngram"]
    assert all(t.predicted is not None for t in told)
    if method == "ngram":
        assert best.config["num_speculative_tokens"] == 7


def test_every_trial_tells_what_was_predicted_before_it_ran(whole: Path) -> None:
    default, *others = searched(whole)
    assert default.predicted is None
    held = []
    for trial in others:
        assert trial.source == "forecast"
        assert trial.predicted is not None
        assert trial.metrics is not None
        told = trial.predicted["metrics"]["tpot.p95"]
        assert told["low"] <= told["value"] <= told["high"]
        assert 0 <= trial.predicted["p_meets_slo"] <= 1
        assert 1 <= trial.predicted["after_trials"] <= trial.number
        held.append(told["low"] <= trial.metrics["tpot"]["p95"] <= told["high"])
    assert sum(held) >= 4
    told = RunFolder(whole).read_run()["forecasts"]
    assert told["given"]
    assert told["considered"] == 3 * 3 * 2


def test_the_proof_is_predicted_too_under_its_own_windows(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with pytest.raises(Interrupted):
        run(path, options(trials=4), most=6)
    run(path, None)
    proof = [t for t in RunFolder(path).read_trials() if t.kind == "proof"]
    assert len(proof) == 4
    for trial in proof:
        assert trial.predicted is not None
        assert trial.objective is not None
        told = trial.predicted["objective"]
        assert told["low"] <= trial.objective <= told["high"]
        assert trial.predicted["after_trials"] == 4


@pytest.mark.parametrize("survived", [1, 4])
def test_interrupted_it_chooses_and_predicts_as_it_would_have(
    tmp_path: Path, whole: Path, survived: int
) -> None:
    path = tmp_path / "out"
    with pytest.raises(Interrupted):
        run(path, options(), most=survived)
    run(path, None)
    expected = [(t.config, t.predicted) for t in searched(whole)]
    assert [(t.config, t.predicted) for t in searched(path)] == expected


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, whole: Path) -> None:
    run(tmp_path / "again", options())
    first, second = (
        [json.dumps([t.config, t.predicted, t.objective]) for t in searched(path)]
        for path in (whole, tmp_path / "again")
    )
    assert first == second


def test_weights_that_crash_are_soon_left_alone(tmp_path: Path) -> None:
    def fails(config: EngineConfig) -> Failed | None:
        return Failed("crash", "boom") if config.quantization == "int8" else None

    run(tmp_path / "out", options(trials=10), fails=fails)
    records = searched(tmp_path / "out")
    assert 1 <= sum(t.outcome == "crash" for t in records) <= 4
    assert any(t.slo_met and t.config["quantization"] == "int4" for t in records)


def test_weights_that_break_the_guard_hand_over_to_their_heirs(tmp_path: Path) -> None:
    narrowing = {**FEW, **FIXED, "quantization": ["none", "int4", "gptq"]}
    kl = {"none": 0.0, "int4": 0.5, "gptq": 0.01}
    asked = options(slo="tpot<12ms,kl<0.1", narrowing=narrowing, trials=6)
    run(tmp_path / "out", asked, kl=kl)
    methods = [t.config["quantization"] for t in searched(tmp_path / "out")]
    assert 1 <= methods.count("int4") <= 2
    assert "gptq" in methods


@pytest.mark.parametrize(
    ("objective", "changes"),
    [
        ("goodput", {"traffic": TrafficOptions(rate=20.0, duration_s=3.0, length_factor=0.1)}),
        ("latency", {"traffic": TrafficOptions(rate=8.0, duration_s=3.0, length_factor=0.1)}),
        ("cost", {"price": 2.0}),
        (
            "capacity",
            {
                "traffic": TrafficOptions(rate=25.0, duration_s=2.0, length_factor=0.1),
                "slo": "ttft<150ms,tpot<12ms",
            },
        ),
    ],
)
def test_every_objective_is_forecast(
    tmp_path: Path, objective: str, changes: dict[str, Any]
) -> None:
    run(tmp_path / "out", options(objective=objective, trials=3, **changes))
    for trial in searched(tmp_path / "out")[1:]:
        assert trial.predicted is not None
        told = trial.predicted["objective"]
        assert trial.objective is not None
        assert told["value"] == pytest.approx(trial.objective, rel=0.25)


def test_nothing_that_keeps_the_promise_is_come_nearer_to(tmp_path: Path) -> None:
    run(tmp_path / "out", options(slo="tpot<1500us", trials=5))
    missed = [t.missed for t in searched(tmp_path / "out")]
    assert min(missed[1:]) < missed[0]


def test_without_records_of_steps_the_sampler_takes_over(tmp_path: Path) -> None:
    path = tmp_path / "out"
    outcome = run(path, options(trials=4), steps=False)
    assert len(searched(path)) == 4
    assert all(t.predicted is None for t in searched(path))
    assert outcome["forecasts"]["given"] is False
    assert any("chosen without forecasts" in note for note in outcome["result"]["notes"])


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_another_sampler_neither_probes_nor_predicts(tmp_path: Path, sampler: str) -> None:
    path = tmp_path / "out"
    evaluator = VirtualTrials(path)
    asked = options(trials=3, sampler=sampler)
    outcome = tune(asked, path, evaluator=evaluator, clock=evaluator.clock)
    assert evaluator.probed == 0
    assert "forecasts" not in outcome
    assert all(t.predicted is None for t in searched(path))


def test_a_budget_without_time_for_forecasts_is_told(tmp_path: Path) -> None:
    path = tmp_path / "out"
    evaluator = VirtualTrials(path)
    traffic = TrafficOptions(rate=8.0, duration_s=3.0, length_factor=0.1)
    asked = options(traffic=traffic, budget_s=38.0, trials=None)
    listener = Silent()
    tune(asked, path, evaluator=evaluator, clock=evaluator.clock, listener=listener)
    assert evaluator.probed == 0
    assert any("without forecasts: a tenth of the budget" in note for note in listener.notes)


def test_a_fault_in_a_forecast_is_a_note_and_not_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise ZeroDivisionError("surprise")

    monkeypatch.setattr("autotune.search.guide.choose", fail)
    outcome = run(tmp_path / "out", options(trials=4))
    assert len(searched(tmp_path / "out")) == 4
    assert any("a fault of ours" in note for note in outcome["result"]["notes"])
    assert "surprise" in (tmp_path / "out" / "trials.log").read_text()


def test_a_small_space_is_measured_to_its_end(tmp_path: Path) -> None:
    narrowing = {**{n: [v[0]] for n, v in FEW.items()}, **FIXED}
    narrowing |= {"max_num_seqs": [1, 2, 4], "quantization": ["none"]}
    narrowing["max_num_batched_tokens"] = [1024]
    asked = options(narrowing=narrowing, trials=20, config={"device": "cpu", "max_num_seqs": 4})
    run(tmp_path / "out", asked)
    assert sorted(t.config["max_num_seqs"] for t in searched(tmp_path / "out")) == [1, 2, 4]
