"""`autotune profile`: which options go together, and how it ends."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from autotune import profile_run
from autotune.cli.main import main
from autotune.diagnose.diagnose import diagnose
from autotune.errors import Interrupted
from autotune.profile_outcome import ProfileOutcome
from autotune.profiling.file import read_profile
from autotune.traffic_options import TrafficOptions
from tests.autotune.diagnose.profiles import profile as by_hand
from tests.autotune.profiling.metrics_pages import Served, endpoint, vllm_page


def autotune(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


Played = list[tuple[dict[str, Any], TrafficOptions, dict[str, Any]]]


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Played:
    """No model: what the command asks for, and a profile made by hand in answer."""
    calls: Played = []
    monkeypatch.chdir(tmp_path)

    def profile(knobs: Any, traffic: TrafficOptions, **others: Any) -> ProfileOutcome:
        calls.append((knobs, traffic, others))
        found = by_hand()
        outcome = ProfileOutcome(found, diagnose(found), interrupted=others["stop"].is_set())
        others["output"].mkdir(parents=True)
        profile_run.keep_outcome(
            profile_run.RunFolder(others["output"]), outcome, others["command"]
        )
        return outcome

    monkeypatch.setattr(profile_run, "profile", profile)
    return calls


def test_options_reach_the_profile(played: Played, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        autotune(
            *("profile", "--rate", "4", "--max-num-seqs", "8", "--seed", "5", "--slo", "ttft<1s"),
            *("--price", "2", "--drain", "7s", "--trace", "--trace-steps", "3:9", "-o", "out"),
        )
        == 0
    )
    ((knobs, traffic, others),) = played
    assert knobs == {"seed": 5, "max_num_seqs": 8}
    assert (traffic.rate, traffic.duration_s) == (4.0, 20.0)
    assert (others["slo"], others["price"], others["drain_limit"]) == ("ttft<1s", 2.0, 7.0)
    assert (others["trace"].first, others["trace"].last) == (3, 8)
    assert others["output"] == Path("out")
    shown = capsys.readouterr()
    assert "Bottlenecks" in shown.out
    assert "Report: out/report.html" in shown.err
    assert Path("out/report.html").exists()


def test_json_is_the_profile_with_its_findings_on_stdout_alone(
    played: Played, capsys: pytest.CaptureFixture[str]
) -> None:
    assert autotune("profile", "--rate", "4", "-o", "out", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["schema_version"] == 1
    assert answer["profile_version"] == 1
    assert answer["run_folder"] == "out"
    assert {p["name"] for p in answer["phases"]} <= {"prefill", "decode", "mixed"}
    kept = json.loads(read_profile(Path("out")).model_dump_json())
    assert {key: answer[key] for key in kept} == kept
    for finding in answer["findings"]:
        assert finding.keys() >= {"metric", "bottleneck", "severity", "share", "evidence"}


def test_without_a_folder_it_is_named_for_time_and_model(played: Played) -> None:
    assert autotune("profile", "--rate", "4") == 0
    (folder,) = Path("runs").iterdir()
    assert folder.name.endswith("-embedded")
    assert read_profile(folder)


def test_interrupt_ends_with_130_and_shows_what_there_is(
    played: Played, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = profile_run.profile

    def stopped(*arguments: Any, stop: threading.Event, **others: Any) -> ProfileOutcome:
        stop.set()
        return inner(*arguments, stop=stop, **others)

    monkeypatch.setattr(profile_run, "profile", stopped)
    assert autotune("profile", "--rate", "4", "-o", "out") == 130
    assert "Bottlenecks" in capsys.readouterr().out


def test_interrupt_before_the_load_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def stopped(*_: Any, **__: Any) -> ProfileOutcome:
        raise Interrupted("Interrupted before anything was measured.")

    monkeypatch.setattr(profile_run, "profile", stopped)
    assert autotune("profile", "--rate", "4", "-o", str(tmp_path / "out")) == 130
    assert capsys.readouterr().err == "Error: Interrupted before anything was measured.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--from", "x", "--rate", "3"), "--rate has no effect with --from"),
        (
            ("--from", "x", "--max-num-seqs", "3", "--trace"),
            "--trace, --max-num-seqs have no effect with --from",
        ),
        (("--from", "x", "--window", "3s"), "--window has no effect with --from"),
        (("--from", "x", "--metrics-url", "http://y"), "contradict each other"),
        (("--metrics-url", "http://y", "--rate", "3"), "--rate has no effect with --metrics-url"),
        (("--metrics-url", "http://y", "--trial", "3"), "--trial has no effect"),
        (("--metrics-url", "http://y", "--window", "soon"), "--window 'soon' is not a duration"),
        (("--trial", "3"), "--trial goes with --from FOLDER"),
        (("--calibrate",), "--calibrate goes with --from FOLDER"),
        (("--window", "3s"), "--window goes with --metrics-url URL"),
        (("--trace-steps", "1:2"), "--trace-steps goes with --trace"),
        (("--trace", "--trace-steps", "9"), "is no range of steps"),
        (("--price", "0"), "--price must be above 0"),
        (("--from", "nowhere"), "nowhere holds no run: run.json is missing"),
        (("--metrics-url", "ftp://y"), "http"),
        (("--workload", "nope"), "neither a file nor a preset"),
        (("--slo", "ttft<3"), "has no unit"),
    ],
)
def test_wrong_usage_ends_with_2_and_one_sentence(
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert autotune("profile", *arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_profile_of_another_version_is_told_what_to_do(
    played: Played, capsys: pytest.CaptureFixture[str]
) -> None:
    from autotune.errors import BadInput

    assert autotune("profile", "--rate", "4", "-o", "out") == 0
    file = Path("out/profile.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "profile_version": 99}))
    with pytest.raises(BadInput, match=r"profile version 99.*make it again"):
        read_profile(Path("out"))


def test_server_is_watched_and_its_profile_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    served = Served(running=1)

    def answer(_: str) -> str:
        for _ in range(30):
            served.serve(0.05, 0.01, 100, 20)
        return vllm_page(served)

    with endpoint(answer) as url:
        code = autotune(
            *("profile", "--metrics-url", url, "--window", "1s", "--slo", "ttft<1s"),
            *("-o", str(tmp_path / "out"), "--json"),
        )
    shown = capsys.readouterr()
    assert code == 0, shown.err
    answered = json.loads(shown.out)
    assert answered["source"]["kind"] == "metrics"
    assert answered["source"]["server"] == "vllm"
    assert answered["traffic"]["completed"] >= 30
    assert read_profile(tmp_path / "out").source.server == "vllm"
    assert (tmp_path / "out" / "report.html").exists()


def test_server_that_is_down_ends_with_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with endpoint(lambda _: "") as url:
        pass  # its port is free again
    assert autotune("profile", "--metrics-url", url, "-o", str(tmp_path / "out")) == 3
    assert "cannot be reached" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_nsys_on_a_processor_is_told_to_see_no_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["autotune", "profile", "--nsys", "--device", "cpu"])
    assert autotune("profile", "--nsys", "--device", "cpu") == 3
    assert capsys.readouterr().err.count("Nsight Systems sees no GPU at work") == 1


def test_nsys_that_is_missing_ends_with_3_and_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["autotune", "profile", "--nsys", "--rate", "4"])
    assert autotune("profile", "--nsys", "--rate", "4") == 3
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "nsys profile" in shown.err
    assert "profile --rate 4" in shown.err
    assert not list(tmp_path.iterdir())
