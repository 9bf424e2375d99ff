"""The whole search over an engine that is played: every ending, every resumption."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest

from autotune.errors import BadInput, Interrupted
from autotune.metrics import compute_metrics
from autotune.model_info import ModelInfo, read_model_info
from autotune.records import RunFolder
from autotune.search import tune as module
from autotune.search.messages import Answer, Failed, MeasureCommand, Measured
from autotune.search.options import TuneOptions
from autotune.search.tune import tune
from autotune.slo import parse_slo
from autotune.traffic_options import TrafficOptions
from engine.config import EngineConfig
from tests.autotune.played import TTFT, PlayedEvaluator, play, play_nothing


def options(**changes: Any) -> TuneOptions:
    settings: dict[str, Any] = {
        "config": {"device": "cpu"},
        "traffic": TrafficOptions(rate=4.0, duration_s=3.0),
        "slo": "ttft<200ms",
        "objective": "latency",
        "budget_s": None,
        "trials": 3,
        "rounds": 2,
        "finalists": 1,
        "advice": False,
        "narrowing": {
            "quantization": ["none", "int8", "int4"],
            "kv_cache_dtype": ["auto"],
            "block_size": [16],
            "max_num_seqs": [256],
            "max_num_batched_tokens": [2048],
            "long_prefill_token_threshold": [0],
            "enable_prefix_caching": [True],
            "scheduling_policy": ["fcfs"],
            "watermark": [0.0],
            "speculative_method": ["none"],
        },
    }
    base = {name: values[0] for name, values in settings["narrowing"].items()}
    settings["config"] |= base
    return TuneOptions(**{**settings, **changes})


def test_the_best_that_keeps_the_promise_wins(
    tmp_path: Path, played: type[PlayedEvaluator]
) -> None:
    run = tune(options(), tmp_path / "out")
    assert run["status"] == "done"
    assert run["result"]["changes"] == {"quantization": ["none", "int4"]}
    assert run["result"]["proven"]
    assert run["result"]["slo_met"]
    # The mean of the rounds' loads, not of the rounds laid end to end with their pauses.
    folder = RunFolder(tmp_path / "out")
    rates = [t.rate for t in folder.read_trials() if t.kind == "proof"]
    assert all(rate is not None and rate > 3.5 for rate in rates)
    assert run["result"]["winner"]["offered_rate"] == pytest.approx(4.0, rel=0.1)


def test_a_measured_rate_is_offered_after_the_calibration(
    tmp_path: Path, played: type[PlayedEvaluator]
) -> None:
    traffic = TrafficOptions(load_factor=0.01, duration_s=3.0)
    run = tune(options(traffic=traffic), tmp_path / "out")
    trials = RunFolder(tmp_path / "out").read_trials()
    assert [t.kind for t in trials[:2]] == ["calibration", "search"]
    assert trials[0].rate is None  # all at once
    assert trials[1].rate is not None
    assert run["notes"][0].startswith("offered rate")


@pytest.mark.parametrize("factor_kept", [0.7, 1.0, 1.4])
def test_capacity_is_judged_by_the_records_of_the_rate_that_held(
    tmp_path: Path, played: type[PlayedEvaluator], factor_kept: float
) -> None:
    bound = 1e3 * TTFT["none"] * factor_kept
    run = tune(options(objective="capacity", slo=f"ttft<{bound:.0f}ms", trials=1), tmp_path / "out")
    folder = RunFolder(tmp_path / "out")
    for trial in folder.read_trials():
        assert trial.metrics is not None
        assert trial.slo_met
        records = folder.read_requests(trial.number)
        assert max(r.intended_send for r in records) > 0
        again = compute_metrics(
            records,
            parse_slo(run["slo"]),
            config=EngineConfig.from_mapping(trial.config),
            load_delivered=True,
            load_note=None,
            seed=0,
        )
        assert again["ttft"] == trial.metrics["ttft"]
        assert again["offered_rate"] == trial.metrics["offered_rate"] == trial.objective
    assert run["result"]["slo_met"]


def test_default_that_always_fails_loses_to_what_runs(
    tmp_path: Path, played: type[PlayedEvaluator]
) -> None:
    def crash_unquantized(command: MeasureCommand) -> Failed | None:
        return Failed("crash", "boom") if command.config["quantization"] == "none" else None

    play(played, crash_unquantized)
    run = tune(options(), tmp_path / "out")
    result = run["result"]
    assert result["baseline"] is None
    assert result["winner_config"]["quantization"] == "int4"
    assert result["slo_met"]
    assert not result["proven"]
    assert "the default could not be measured" in result["verdict"]


def test_default_that_always_fails_loses_even_where_nothing_keeps_the_promise(
    tmp_path: Path, played: type[PlayedEvaluator]
) -> None:
    def crash_unquantized(command: MeasureCommand) -> Failed | None:
        return Failed("crash", "boom") if command.config["quantization"] == "none" else None

    play(played, crash_unquantized)
    result = tune(options(slo="ttft<1us"), tmp_path / "out")["result"]
    assert result["winner_config"]["quantization"] == "int4"
    assert not result["slo_met"]


def test_nothing_that_runs_is_no_result(tmp_path: Path, played: type[PlayedEvaluator]) -> None:
    play(played, lambda _: Failed("out_of_memory", "no room"))
    run = tune(options(), tmp_path / "out")
    assert run["status"] == "done"
    assert run["result"] is None
    assert {t.outcome for t in RunFolder(tmp_path / "out").read_trials()} == {"out_of_memory"}


@pytest.mark.parametrize("survived", range(7))
def test_interrupted_anywhere_it_comes_to_the_same_end(
    tmp_path: Path, played: type[PlayedEvaluator], survived: int
) -> None:
    whole = tune(options(trials=3), tmp_path / "whole")
    left = survived

    def stop_later(_: MeasureCommand) -> None:
        nonlocal left
        if left == 0:
            raise Interrupted("stopped")
        left -= 1

    play(played, stop_later)
    with pytest.raises(Interrupted):
        tune(options(trials=3), tmp_path / "out")
    folder = RunFolder(tmp_path / "out")
    assert folder.read_run()["status"] == "interrupted"
    assert len(folder.read_trials()) == survived
    # A verdict needs an interval, hence two rounds of both.
    assert folder.read_run()["result"] is None
    play(played, play_nothing)
    run = tune(None, tmp_path / "out")
    assert run["status"] == "done"
    for key in ("verdict", "gain", "winner_config", "importances", "winner", "slo_met"):
        assert run["result"][key] == whole["result"][key]


def test_importances_survive_an_interruption_of_the_proof(
    tmp_path: Path, played: type[PlayedEvaluator]
) -> None:
    narrowing = {**options().narrowing, "block_size": [16, 32]}
    settings = options(trials=6, narrowing=narrowing)
    whole = tune(settings, tmp_path / "whole")
    assert whole["result"]["importances"]

    def stop_in_proof(command: MeasureCommand) -> None:
        if command.window > 0:
            raise Interrupted("stopped")

    play(played, stop_in_proof)
    with pytest.raises(Interrupted):
        tune(settings, tmp_path / "out")
    play(played, play_nothing)
    resumed = tune(None, tmp_path / "out")
    assert resumed["result"]["importances"].keys() == whole["result"]["importances"].keys()


def test_killed_while_it_concluded_it_concludes_when_resumed(
    tmp_path: Path, played: type[PlayedEvaluator], monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(self: RunFolder) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "merge_parts", kill)
        with pytest.raises(KeyboardInterrupt):
            tune(options(), path)
    assert tune(None, path)["result"]["proven"]
    folder = RunFolder(path)
    assert folder.lock.exists()
    assert folder.requests_parquet.exists()
    assert not folder.parts.exists()


def test_resumed_run_needs_neither_its_trace_nor_its_space_file(
    tmp_path: Path, played: type[PlayedEvaluator], monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "trace.csv"
    rows = [f"2023-11-16 18:15:{i % 60:02d}.0000000,20,2\n" for i in range(50)]
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(rows))
    space = tmp_path / "space.yaml"
    space.write_text("quantization: [none, int4]\n")
    settings = options(
        traffic=TrafficOptions(source=str(trace), duration_s=5.0),
        narrowing={},
        space_file=str(space),
        trials=2,
    )

    def stop_second(command: MeasureCommand) -> None:
        if command.trial > 0:
            raise Interrupted("stopped")

    play(played, stop_second)
    with pytest.raises(Interrupted):
        tune(settings, tmp_path / "out")
    trace.unlink()
    space.unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    play(played, play_nothing)
    assert tune(None, tmp_path / "out")["status"] == "done"


def test_result_of_another_command_cannot_be_resumed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_json(folder.run_json, {"schema_version": 1, "kind": "bench"})
    with pytest.raises(BadInput, match="autotune bench"):
        tune(None, tmp_path)


def test_what_a_killed_beginning_left_is_no_obstacle(
    tmp_path: Path, played: type[PlayedEvaluator]
) -> None:
    (tmp_path / ".busy").touch()
    (tmp_path / ".run.json.x7").touch()
    assert tune(options(trials=1), tmp_path)["status"] == "done"


def test_a_checkpoint_is_not_quantized_twice(
    tmp_path: Path, played: type[PlayedEvaluator], monkeypatch: pytest.MonkeyPatch
) -> None:
    def quantized(config: EngineConfig) -> ModelInfo:
        return dataclasses.replace(read_model_info(config), quantization="gptq int4")

    monkeypatch.setattr("autotune.search.prepare.read_model_info", quantized)
    asked = options()
    asked = dataclasses.replace(asked, config={**asked.config, "quantization": "int8"})
    with pytest.raises(BadInput, match=r"already quantized \(gptq int4\)"):
        tune(asked, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_space_of_a_single_point_ends_after_the_default(
    tmp_path: Path, played: type[PlayedEvaluator]
) -> None:
    narrowing = {**options().narrowing, "quantization": ["none"]}
    run = tune(options(narrowing=narrowing, trials=9), tmp_path / "out")
    kinds = [t.kind for t in RunFolder(tmp_path / "out").read_trials()]
    assert kinds == ["search", "proof", "proof"]
    assert "no other configuration" in run["result"]["verdict"]


def test_proof_leaves_rounds_out_that_the_budget_does_not_pay_for(
    tmp_path: Path, played: type[PlayedEvaluator], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(
        module, "time", type("Clock", (), {"monotonic": staticmethod(lambda: clock[0])})
    )

    def slow(_: MeasureCommand) -> None:
        clock[0] += 30.0

    play(played, slow)
    # Planned are trials of 5 s, and each takes 30.
    run = tune(options(budget_s=140.0, rounds=8, trials=None), tmp_path / "out")
    proof = [t for t in RunFolder(tmp_path / "out").read_trials() if t.kind == "proof"]
    assert max(t.round for t in proof) == 1
    assert run["result"]["gain"]["low"] <= run["result"]["gain"]["value"]
    assert any("2 of 8 rounds" in note for note in run["result"]["notes"])


def test_undelivered_load_is_neither_a_gain_nor_a_promise_kept(
    tmp_path: Path, played: type[PlayedEvaluator]
) -> None:
    path = tmp_path / "out"
    folder = RunFolder(path)
    engine = PlayedEvaluator(folder, threading.Event(), None)

    def late(command: MeasureCommand) -> Measured | None:
        if command.window == 0:
            return None
        play(played, play_nothing)
        measured = engine.measure(command, 1.0)
        play(played, late)
        assert isinstance(measured, Measured)
        return dataclasses.replace(
            measured, metrics={**measured.metrics, "load_delivered": False, "load_note": "late"}
        )

    play(played, late)
    result = tune(options(), path)["result"]
    assert result["verdict"].startswith("No verdict")
    assert not result["slo_met"]
    assert result["changes"] == {}


def test_a_cheaper_point_does_not_push_a_seed_out(
    tmp_path: Path, played: type[PlayedEvaluator]
) -> None:
    narrowing = {**options().narrowing, "block_size": [8, 16, 32, 64], "max_num_seqs": [64, 256]}
    tune(options(narrowing=narrowing, trials=4), tmp_path / "out")
    search = [t for t in RunFolder(tmp_path / "out").read_trials() if t.kind == "search"]
    assert len(search) == 4
    assert {t.config["quantization"] for t in search[:3]} == {"none", "int8", "int4"}
    assert sum(t.source.startswith("extreme") for t in search) == 2


def test_how_the_checkpoint_is_served_is_in_the_result(
    tmp_path: Path, played: type[PlayedEvaluator], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = played.measure

    def with_notes(self: PlayedEvaluator, command: MeasureCommand, limit: float) -> Answer:
        measured = answer(self, command, limit)
        assert isinstance(measured, Measured)
        return Measured(measured.metrics, ["2 layers are served in floats"])

    monkeypatch.setattr(played, "measure", with_notes)
    run = tune(options(), tmp_path / "out")
    assert run["result"]["notes"].count("2 layers are served in floats") == 1
    assert "2 layers are served in floats" in RunFolder(tmp_path / "out").read_run()["notes"]
