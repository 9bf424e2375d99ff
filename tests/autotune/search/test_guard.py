"""The guard in a whole search over an engine that is played."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autotune.records import RunFolder, TrialRecord
from autotune.search.messages import Failed, MeasureCommand
from autotune.search.tune import tune
from tests.autotune.played import PlayedEvaluator, play
from tests.autotune.search.test_tune import options

KL = {"none": 0.0, "int8": 0.001, "int4": 0.03, "gptq": 0.012, "awq": 0.04}
METHODS = ["none", "int8", "int4", "gptq", "awq"]


def guarded(**changes: Any) -> Any:
    settings = options(**changes)
    narrowing = {"quantization": METHODS, **changes.get("narrowing", {})}
    return options(
        slo="ttft<200ms,kl<0.02",
        trials=changes.pop("trials", 6),
        **{**changes, "narrowing": {**settings.narrowing, **narrowing}},
    )


def searched(path: Path) -> list[TrialRecord]:
    return [t for t in RunFolder(path).read_trials() if t.kind == "search"]


def test_the_fastest_that_breaks_the_guard_is_neither_winner_nor_finalist(
    tmp_path: Path, played: type[PlayedEvaluator], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(played, "kl", KL)
    result = tune(guarded(finalists=4), tmp_path / "out")["result"]
    assert result["winner_config"]["quantization"] == "gptq"
    assert result["slo_met"]
    methods = {f["config"]["quantization"] for f in result["finalists"]}
    assert methods == {"int8", "gptq"}
    int4 = next(t for t in searched(tmp_path / "out") if t.config["quantization"] == "int4")
    assert (int4.outcome, int4.metrics, int4.objective) == ("quality", None, None)
    assert int4.quality is not None
    assert "kl 0.03 (95% interval 0.028 to 0.032) breaks kl<0.02" in str(int4.reason)
    assert [limit.limit for limit in int4.slo] == ["kl<0.02"]
    assert not int4.slo_met
    assert result["quality"]["int4"]["feasible"] is False
    assert result["quality"]["gptq"]["feasible"] is True


def test_calibrated_methods_are_tried_after_the_plain_one_broke_the_guard(
    tmp_path: Path, played: type[PlayedEvaluator], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(played, "kl", KL)
    tune(guarded(), tmp_path / "out")
    by_method = {t.config["quantization"]: t for t in searched(tmp_path / "out")}
    assert by_method["gptq"].source == "as fast as int4 and calibrated"
    # int8 keeps the guard: nothing has to replace it, and nothing of its speed is among the values.
    assert by_method["int8"].source.startswith("extreme")


def test_a_broken_method_is_not_loaded_again_with_other_knobs(
    tmp_path: Path, played: type[PlayedEvaluator], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(played, "kl", KL)
    asked: list[str] = []

    def count(command: MeasureCommand) -> None:
        asked.append(command.config["quantization"])

    play(played, count)
    narrowing = {"block_size": [8, 16, 32, 64], "max_num_seqs": [64, 128, 256]}
    tune(guarded(trials=40, narrowing=narrowing), tmp_path / "out")
    assert asked.count("int4") == 1
    assert asked.count("awq") <= 1
    assert len(asked) > 20


def test_the_default_is_measured_whatever_its_quality(
    tmp_path: Path, played: type[PlayedEvaluator], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(played, "kl", KL)
    settings = guarded(trials=3)
    settings = options(
        slo=settings.slo,
        trials=3,
        config={**settings.config, "quantization": "int4"},
        narrowing={**settings.narrowing, "quantization": ["int4", "none"]},
    )
    result = tune(settings, tmp_path / "out")["result"]
    assert result["baseline"]["kl"] == 0.03
    assert result["winner_config"]["quantization"] == "none"
    assert result["slo_met"]
    assert [limit["met"] for limit in result["baseline_slo"]] == [True, False]


def test_an_interval_that_holds_the_limit_is_a_note_of_the_result(
    tmp_path: Path, played: type[PlayedEvaluator], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(played, "kl", {"none": 0.0, "int8": 0.0, "int4": 0.019})
    narrowing = {"quantization": ["none", "int4"]}
    result = tune(guarded(narrowing=narrowing), tmp_path / "out")["result"]
    assert result["winner_config"]["quantization"] == "int4"
    assert any("the interval holds the limit" in note for note in result["notes"])


def test_a_method_whose_preparation_took_too_long_is_not_tried_again(
    tmp_path: Path, played: type[PlayedEvaluator], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(played, "kl", KL)
    asked: list[str] = []

    def slow(command: MeasureCommand) -> Failed | None:
        asked.append(command.config["quantization"])
        return Failed("timeout", "quantizing") if asked[-1] in ("gptq", "awq") else None

    play(played, slow)
    narrowing = {"block_size": [8, 16, 32, 64]}
    result = tune(guarded(trials=20, narrowing=narrowing), tmp_path / "out")["result"]
    assert asked.count("gptq") == asked.count("awq") == 1
    assert result["slo_met"]


def test_interrupted_after_a_broken_guard_it_comes_to_the_same_winner(
    tmp_path: Path, played: type[PlayedEvaluator], monkeypatch: pytest.MonkeyPatch
) -> None:
    from autotune.errors import Interrupted
    from tests.autotune.played import play_nothing

    monkeypatch.setattr(played, "kl", KL)
    whole = tune(guarded(), tmp_path / "whole")

    def stop(command: MeasureCommand) -> None:
        if command.trial == 3:
            raise Interrupted("stopped")

    play(played, stop)
    with pytest.raises(Interrupted):
        tune(guarded(), tmp_path / "out")
    play(played, play_nothing)
    resumed = tune(None, tmp_path / "out")
    assert resumed["result"]["winner_config"] == whole["result"]["winner_config"]
