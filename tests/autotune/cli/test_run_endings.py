"""Every way in which `autotune run` may end, over an engine that is played."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from autotune.cli.main import main
from autotune.embedded import TARGET
from autotune.errors import EnvironmentMissing, Interrupted
from autotune.records import RunFolder
from autotune.search.messages import Failed, MeasureCommand
from tests.autotune.played import PlayedEvaluator, play, play_nothing

SHORT = (
    *("run", "--device", "cpu", "--slo", "ttft<200ms", "--duration", "3s", "--rounds", "2"),
    *("--finalists", "1", "--trials", "3", "--search", "quantization=none,int8,int4"),
)
KEYS = {
    *("slo_met", "objective", "baseline", "winner", "gain", "run_folder", "trials", "seconds"),
}


def autotune(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize(
    "arguments",
    [
        ("--objective", "goodput", "--rate", "4"),
        ("--objective", "throughput", "--rate", "4"),
        ("--objective", "latency", "--rate", "4"),
        ("--objective", "cost", "--price", "1.2", "--rate", "4"),
        ("--objective", "capacity", "--rate", "4"),
        ("--objective", "goodput", "--load", "0.1"),
        ("--objective", "throughput", "--rate", "inf", "--requests", "16"),
    ],
)
def test_every_objective_ends_with_a_result(
    tmp_path: Path,
    played: type[PlayedEvaluator],
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
) -> None:
    path = tmp_path / "out"
    assert autotune(*SHORT, *arguments, "-o", str(path)) == 0
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    assert "throughput" in shown.out
    assert (path / "deploy" / "engine.yaml").exists()
    assert autotune("run", "--resume", str(path), "--json") == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert answer.keys() >= KEYS
    assert answer["objective"] == arguments[1]
    assert answer["gain"].keys() >= {"value", "low", "high", "confidence"}
    assert answer["baseline"]["ttft"]["p99"] > 0


def test_nothing_that_runs_ends_with_4_and_says_why(
    tmp_path: Path, played: type[PlayedEvaluator], capsys: pytest.CaptureFixture[str]
) -> None:
    play(played, lambda _: Failed("out_of_memory", "no room for the cache"))
    assert autotune(*SHORT, "--rate", "4", "--json", "-o", str(tmp_path / "out")) == 4
    shown = capsys.readouterr()
    answer = json.loads(shown.out)
    assert answer.keys() >= KEYS
    assert (answer["slo_met"], answer["winner"]) == (False, None)
    assert "No configuration could be measured: no room for the cache" in shown.err
    assert (tmp_path / "out" / "report.html").exists()
    assert autotune("run", "--resume", str(tmp_path / "out")) == 4


def test_default_that_fails_is_shown_beside_the_winner(
    tmp_path: Path, played: type[PlayedEvaluator], capsys: pytest.CaptureFixture[str]
) -> None:
    def crash_unquantized(command: MeasureCommand) -> Failed | None:
        return Failed("crash", "boom") if command.config["quantization"] == "none" else None

    play(played, crash_unquantized)
    assert autotune(*SHORT, "--rate", "4", "-o", str(tmp_path / "out")) == 0
    shown = capsys.readouterr().out
    assert "the default could not be measured" in shown
    assert "ttft<200ms" in shown


@pytest.mark.parametrize("load", [("--rate", "4"), ("--load", "0.1")])
@pytest.mark.parametrize("survived", [0, 1, 4])
def test_interrupted_it_says_how_to_go_on(
    tmp_path: Path,
    played: type[PlayedEvaluator],
    capsys: pytest.CaptureFixture[str],
    load: tuple[str, str],
    survived: int,
) -> None:
    def stop(command: MeasureCommand) -> None:
        if command.trial >= survived:
            raise Interrupted("stopped")

    play(played, stop)
    path = tmp_path / "out"
    assert autotune(*SHORT, *load, "-o", str(path)) == 130
    assert f"autotune run --resume {path}" in capsys.readouterr().err
    assert (path / "report.html").exists()
    play(played, play_nothing)
    assert autotune("run", "--resume", str(path), "--trials", "9") == 0
    assert "ignored: --trials" in capsys.readouterr().err
    assert sum(t.kind == "search" for t in RunFolder(path).read_trials()) == 3


def test_full_disk_in_the_trial_process_ends_with_3(
    tmp_path: Path, played: type[PlayedEvaluator], capsys: pytest.CaptureFixture[str]
) -> None:
    def full(command: MeasureCommand) -> None:
        if command.trial == 1:
            raise EnvironmentMissing("no space is left on the disk")

    play(played, full)
    path = tmp_path / "out"
    assert autotune(*SHORT, "--rate", "4", "-o", str(path)) == 3
    assert "no space" in capsys.readouterr().err
    play(played, play_nothing)
    assert autotune("run", "--resume", str(path)) == 0
    assert all(t.outcome == "ok" for t in RunFolder(path).read_trials())


def test_result_of_bench_is_not_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(tmp_path)
    folder.write_json(folder.run_json, {"schema_version": 1, "kind": "bench"})
    assert autotune("run", "--resume", str(tmp_path)) == 2
    assert "autotune bench" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "bench"])
def test_quality_of_a_model_without_a_tokenizer_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(TARGET, model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    out = tmp_path / "out"
    arguments = ("--model", str(model), "--slo", "quality_loss<1%", "--rate", "4")
    assert autotune(command, *arguments, "-o", str(out)) == 2
    assert "tokenizer" in capsys.readouterr().err
    assert not out.exists()


def test_bench_refuses_a_folder_that_cannot_be_made_before_it_measures(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert autotune("bench", "--rate", "4", "-o", "/proc/none/out") == 3
    assert "/proc/none/out" in capsys.readouterr().err


def test_tasks_that_fail_cost_neither_report_nor_files(
    tmp_path: Path,
    played: type[PlayedEvaluator],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any) -> None:
        raise EnvironmentMissing("the data of arc_easy cannot be had")

    monkeypatch.setattr("autotune.lm_eval_adapter.check_lm_eval", lambda: None)
    monkeypatch.setattr("autotune.lm_eval_adapter.run_tasks", fail)
    path = tmp_path / "out"
    assert autotune(*SHORT, "--rate", "4", "--lm-eval-tasks", "arc_easy", "-o", str(path)) == 3
    assert "the data of arc_easy cannot be had" in capsys.readouterr().err
    assert (path / "report.html").exists()
    assert (path / "deploy" / "engine.yaml").exists()
