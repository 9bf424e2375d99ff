"""A search that begins with advice, over an engine that is played."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from autotune.advise.advice import Advice, AdviceList
from autotune.diagnose.finding import Diagnosis, Finding
from autotune.errors import Interrupted
from autotune.predict.change import Change
from autotune.predict.gain import PredictedGain
from autotune.profiling.file import read_profile
from autotune.profiling.machine import MachineCalibration
from autotune.profiling.schema import Ceilings, Probes, Profile, Source, Traffic
from autotune.records import RunFolder, TrialRecord
from autotune.search import advised as module
from autotune.search.events import Silent
from autotune.search.messages import Failed, MeasureCommand, ProbeCommand, Probed
from autotune.search.options import TuneOptions
from autotune.search.probing import SHARE
from autotune.search.tune import tune
from tests.autotune.advise import situations
from tests.autotune.played import PlayedEvaluator, play, play_nothing
from tests.autotune.search.test_tune import options

CEILINGS = Ceilings(
    bandwidth=2e10,
    working_set_bandwidth=1e11,
    matmul={"bfloat16": 1e12},
    compute_dtype="bfloat16",
    ridge=10.0,
)
FINDING = Finding("ttft", "prefill_compute", 0.8, 0.7, {}, "TTFT is arithmetic on the prompt.")


def piece(technique: str, gain: PredictedGain | None, **changes: Any) -> Advice:
    fields: dict[str, Any] = {
        "technique": technique,
        "title": technique,
        "category": "model",
        "problems": ("prefill_compute",),
        "role": "primary",
        "knobs": {},
        "opens": {},
        "gain": gain,
        "gains": (),
        "confidence": "high",
        "effort": "reload",
        "trade_off": "",
        "check": "",
        "why": "",
        "testable": True,
    }
    return Advice(**{**fields, **changes})


def ttft(value: float, low: float, high: float) -> PredictedGain:
    return PredictedGain("ttft", value, low, high, "replay", "p95")


# Played: int4 is three times as fast as floats, int8 slower, seats make no difference.
ADVICE = AdviceList(
    (
        piece("weights-int4", ttft(2.9, 2.5, 3.5), knobs={"quantization": "int4"}),
        piece("another-gpu", None, testable=False, why_not="it is not here"),
        piece("fewer-seats", ttft(2.0, 1.5, 2.5), knobs={"max_num_seqs": 64}),
    ),
    first="weights-int4",
)
IRRELEVANT = {"block_size": "blocks are never short", "scheduling_policy": "nothing waits"}


@dataclasses.dataclass
class Drawing:
    """Stands in for profile, diagnosis and prediction; counts how often it was asked."""

    times: int = 0
    machine: MachineCalibration | None = None
    trial: TrialRecord | None = None

    def __call__(
        self,
        prepared: Any,
        folder: RunFolder,
        trial: TrialRecord,
        machine: MachineCalibration | None,
        prediction_s: float,
    ) -> module.Drawn:
        self.times, self.machine, self.trial = self.times + 1, machine, trial
        assert prediction_s > 0
        profile = Profile(
            created_at="",
            source=Source(kind="records", where=str(folder.path), trial=trial.number),
            traffic=Traffic(
                requests=1,
                completed=1,
                refused=0,
                failed=0,
                timed_out=0,
                duration_s=1.0,
                rate=None,
                input_tokens=None,
                output_tokens=None,
            ),
        )
        return module.Drawn(profile, Diagnosis((FINDING,)), ADVICE, IRRELEVANT)


class Audience(Silent):
    """Keeps what it is told of advice."""

    told: tuple[Any, Any] | None = None

    def advised(self, findings: Any, advice: Any) -> None:
        self.told = (findings, advice)


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch, played: type[PlayedEvaluator]) -> Drawing:
    drawing = Drawing()
    monkeypatch.setattr(module, "draw_up_advice", drawing)
    monkeypatch.setattr(played, "probed", Probed(CEILINGS.model_dump(), Probes().model_dump()))
    return drawing


def advised(**changes: Any) -> TuneOptions:
    """Of `options` with advice, where the knobs besides the quantization are not the user's."""
    settings = options()
    space = {
        "narrowing": {"quantization": ["none", "int8", "int4"], "kv_cache_dtype": ["auto"]},
        "config": {"device": "cpu", "max_num_seqs": 256, "block_size": 16},
    }
    return dataclasses.replace(settings, **{"advice": True, "trials": 4, **space, **changes})


def searched(path: Path) -> list[TrialRecord]:
    return [t for t in RunFolder(path).read_trials() if t.kind == "search"]


def test_what_is_advised_is_tried_first_and_scored(tmp_path: Path, drawing: Drawing) -> None:
    audience = Audience()
    run = tune(advised(), tmp_path / "out", listener=audience)
    sources = [t.source for t in searched(tmp_path / "out")]
    assert sources[0] == "default"
    assert set(sources[1:3]) == {"advice: weights-int4", "advice: fewer-seats"}
    assert drawing.trial == searched(tmp_path / "out")[0]
    assert drawing.machine == MachineCalibration(CEILINGS, Probes())
    board = run["result"]["scoreboard"]
    held = {entry["technique"]: entry["held"] for entry in board["entries"]}
    assert held == {"weights-int4": True, "fewer-seats": False}
    assert (board["scored"], board["held_share"], board["direction_share"]) == (2, 0.5, 0.5)
    folder = RunFolder(tmp_path / "out")
    assert read_profile(folder.path).source.trial == 0
    findings = json.loads(folder.diagnosis_json.read_text())["findings"]
    assert findings[0]["sentence"] == FINDING.sentence
    assert json.loads(folder.advice_json.read_text())["first"] == "weights-int4"
    assert audience.told == (findings, json.loads(folder.advice_json.read_text())["advice"])


def test_knobs_that_cannot_matter_are_not_searched_and_the_user_is_told(
    tmp_path: Path, drawing: Drawing
) -> None:
    run = tune(advised(), tmp_path / "out")
    assert "block_size" not in run["search_space"]
    assert run["advice"]["fixed"]["block_size"] == IRRELEVANT["block_size"]
    assert "block_size is not searched: blocks are never short" in run["result"]["notes"]
    assert {t.config["block_size"] for t in searched(tmp_path / "out")} == {16}


def test_a_space_of_the_users_own_stays_as_it_is(tmp_path: Path, drawing: Drawing) -> None:
    space = tmp_path / "space.yaml"
    space.write_text("quantization: [none, int4]\nblock_size: [16, 32]\n")
    run = tune(advised(narrowing={}, space_file=str(space)), tmp_path / "out")
    assert run["search_space"] == {"quantization": ["none", "int4"], "block_size": [16, 32]}
    # Advice whose knobs are not in it is not tried, and says so.
    seats = run["result"]["scoreboard"]["entries"][1]
    assert "not tried" in seats["why_not"]


@pytest.mark.parametrize("survived", range(1, 7))
def test_interrupted_anywhere_it_follows_the_same_advice(
    tmp_path: Path, played: type[PlayedEvaluator], drawing: Drawing, survived: int
) -> None:
    whole = tune(advised(), tmp_path / "whole")
    drawing.times = 0
    left = survived

    def stop_later(_: MeasureCommand) -> None:
        nonlocal left
        if left == 0:
            raise Interrupted("stopped")
        left -= 1

    play(played, stop_later)
    with pytest.raises(Interrupted):
        tune(advised(), tmp_path / "out")
    play(played, play_nothing)
    run = tune(None, tmp_path / "out")
    assert drawing.times == 1
    for name in ("scoreboard", "verdict", "gain", "winner_config", "importances", "notes"):
        assert run["result"][name] == whole["result"][name], name
    assert run["search_space"] == whole["search_space"]
    configs = [[t.config for t in searched(tmp_path / name)] for name in ("out", "whole")]
    assert configs[0] == configs[1]


def test_stopped_during_the_probes_it_is_advised_when_it_goes_on(
    tmp_path: Path,
    played: type[PlayedEvaluator],
    drawing: Drawing,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*_: Any) -> Any:
        raise Interrupted("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(played, "probe", stop)
        with pytest.raises(Interrupted):
            tune(advised(), tmp_path / "out")
    assert "advice" not in RunFolder(tmp_path / "out").read_run()
    assert tune(None, tmp_path / "out")["result"]["scoreboard"]["scored"] == 2


def test_advice_that_was_lost_is_a_note_and_not_the_end(
    tmp_path: Path, played: type[PlayedEvaluator], drawing: Drawing
) -> None:
    def stop_third(command: MeasureCommand) -> None:
        if command.trial == 2:
            raise Interrupted("stopped")

    play(played, stop_third)
    with pytest.raises(Interrupted):
        tune(advised(), tmp_path / "out")
    folder = RunFolder(tmp_path / "out")
    folder.advice_json.write_text("{")
    play(played, play_nothing)
    result = tune(None, tmp_path / "out")["result"]
    assert result["scoreboard"] is None
    assert any("advice.json cannot be read" in note for note in result["notes"])


def test_without_advice_nothing_is_probed_or_written(
    tmp_path: Path, played: type[PlayedEvaluator], drawing: Drawing
) -> None:
    run = tune(advised(advice=False), tmp_path / "out")
    assert (drawing.times, run["result"]["scoreboard"]) == (0, None)
    assert "advice" not in run
    assert not RunFolder(tmp_path / "out").advice_json.exists()


def test_probes_that_fail_leave_advice_without_them(
    tmp_path: Path,
    played: type[PlayedEvaluator],
    drawing: Drawing,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(played, "probed", Failed("crash", "boom"))
    run = tune(advised(), tmp_path / "out")
    assert (drawing.times, drawing.machine) == (1, None)
    assert any("predictions are rough: boom" in note for note in run["result"]["notes"])


def test_a_fault_in_the_advice_costs_no_measurement(
    tmp_path: Path, drawing: Drawing, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise KeyError("surprise")

    monkeypatch.setattr(module, "draw_up_advice", fail)
    run = tune(advised(), tmp_path / "out")
    assert len(searched(tmp_path / "out")) == 4
    assert any("without advice: a fault of ours" in note for note in run["result"]["notes"])
    assert "KeyError: 'surprise'" in (tmp_path / "out" / "trials.log").read_text()
    assert run["advice"]["given"] is False


def test_what_was_not_tried_is_named_where_the_winner_misses_its_limits(
    tmp_path: Path, drawing: Drawing, monkeypatch: pytest.MonkeyPatch
) -> None:
    untried = [
        piece(name, ttft(1.1, 1.0, 1.2), testable=False)
        for name in ("response_caching", "model_routing")
    ]
    both = dataclasses.replace(ADVICE, advice=(*ADVICE.advice, *untried))
    monkeypatch.setattr(sys.modules[__name__], "ADVICE", both)

    def profiled(*_: Any) -> Any:
        # Judged for the winner, whatever it promised for the default.
        return situations.profile(), situations.Told(_gain_of_requests)

    found = situations.diagnosis(situations.finding("ttft", "queue_saturation"), binding="ttft")
    monkeypatch.setattr(module, "_profile", profiled)
    monkeypatch.setattr("autotune.diagnose.diagnose.diagnose", lambda _: found)
    run = tune(advised(slo="ttft<20ms"), tmp_path / "out")
    assert not run["result"]["slo_met"]
    (limit,) = run["result"]["infeasible"]
    techniques = [r["technique"] for r in limit["relaxations"] if r["kind"] == "technique"]
    assert techniques == ["response_caching"]


def _gain_of_requests(change: Change) -> float:
    """Enough for the cache of responses alone, which keeps a fifth of the requests away."""
    requests = change.factors.get("requests")
    return 100.0 if requests is not None and requests.value > 0.8 else 1.2


def test_a_default_that_fails_is_not_advised_on(
    tmp_path: Path, played: type[PlayedEvaluator], drawing: Drawing
) -> None:
    def crash_unquantized(command: MeasureCommand) -> Failed | None:
        return Failed("crash", "boom") if command.config["quantization"] == "none" else None

    play(played, crash_unquantized)
    run = tune(advised(), tmp_path / "out")
    assert drawing.times == 0
    assert any("default could not be measured" in note for note in run["result"]["notes"])


@pytest.mark.parametrize(("budget_s", "why"), [(39.0, "tenth of the budget"), (45.0, None)])
def test_a_budget_that_is_too_small_for_advice_is_told(
    tmp_path: Path,
    played: type[PlayedEvaluator],
    drawing: Drawing,
    monkeypatch: pytest.MonkeyPatch,
    budget_s: float,
    why: str | None,
) -> None:
    asked: list[float] = []
    answer = played.probe

    def probe(self: PlayedEvaluator, command: ProbeCommand) -> Probed | Failed:
        asked.append(command.budget_s)
        return answer(self, command)

    monkeypatch.setattr(played, "probe", probe)
    run = tune(advised(budget_s=budget_s), tmp_path / "out")
    if why is None:
        assert 0 < sum(asked) < SHARE * budget_s
        assert run["advice"]["given"]
    else:
        assert not asked
        assert why in run["advice"]["reason"]


def test_advice_that_leaves_no_time_to_follow_it_is_not_sought(
    tmp_path: Path,
    played: type[PlayedEvaluator],
    drawing: Drawing,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    fake = type("Clock", (), {"monotonic": staticmethod(lambda: clock[0])})
    monkeypatch.setattr("autotune.search.tune.time", fake)

    def slow(_: MeasureCommand) -> None:
        clock[0] += 20.0

    play(played, slow)
    run = tune(advised(budget_s=45.0, trials=None), tmp_path / "out")
    assert drawing.times == 0
    assert "no time for a trial" in run["advice"]["reason"]


def test_a_run_of_an_earlier_release_goes_on_without_advice(
    tmp_path: Path, played: type[PlayedEvaluator], drawing: Drawing
) -> None:
    def stop_second(command: MeasureCommand) -> None:
        if command.trial == 1:
            raise Interrupted("stopped")

    play(played, stop_second)
    with pytest.raises(Interrupted):
        tune(advised(advice=False), tmp_path / "out")
    folder = RunFolder(tmp_path / "out")
    run = folder.read_run()
    del run["options"]["advice"]
    folder.write_json(folder.run_json, run)
    play(played, play_nothing)
    assert tune(None, tmp_path / "out")["status"] == "done"
    assert drawing.times == 0
