"""`autotune simulate`: what reaches the simulation, what is shown, and how it ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autotune.cli.main import main
from autotune.predict.calibration_file import write_calibration
from autotune.simulation import run as simulation_run
from autotune.simulation.options import SimulateOptions
from tests.autotune.predict.calibrated_loads import CONFIG, calibrated, swept

Autotune = Callable[..., int]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration of the embedded model."""
    path = tmp_path_factory.mktemp("kept") / "calibration.json"
    write_calibration(path, calibrated(swept(CONFIG)))
    return path


@pytest.fixture
def autotune(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Autotune:
    """Run the command on a short load; returns its exit code."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, costs: tuple[str, ...] | None = None, rate: str = "3") -> int:
        costs = ("--calibration", str(file)) if costs is None else costs
        with pytest.raises(SystemExit) as ended:
            main(
                [
                    *("simulate", "--rate", rate, "--duration", "6s", "--draws", "3"),
                    *costs,
                    *arguments,
                ]
            )
        assert isinstance(ended.value.code, int)
        return ended.value.code

    return run


def test_it_ends_as_bench_does(autotune: Autotune, capsys: pytest.CaptureFixture[str]) -> None:
    assert autotune("--slo", "ttft<100s") == 0
    shown = capsys.readouterr()
    assert "chance to meet the SLO 100% (of 3 draws)" in shown.out
    assert "ttft, ms" in shown.out
    assert "1 replica" in shown.out
    assert autotune("--slo", "ttft<1us") == 4
    assert "chance to meet the SLO 0%" in capsys.readouterr().out


def test_lines_fit_80_columns(
    autotune: Autotune, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert autotune("--rate", "20", "--max-num-seqs", "2", "--drain", "100s") == 4
    out = capsys.readouterr().out
    assert "…" not in out
    assert "e2e, s" in out  # too long for milliseconds
    assert max(map(len, out.splitlines())) <= 80


def test_json_has_the_keys_of_bench_with_bounds(
    autotune: Autotune, capsys: pytest.CaptureFixture[str]
) -> None:
    assert autotune("--slo", "ttft<100s", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["schema_version"] == 1
    for metric in ("ttft", "tpot", "itl", "e2e"):
        assert set(answer[metric]) == {"mean", "p50", "p90", "p95", "p99"}
        for number in answer[metric].values():
            assert number["low"] <= number["value"] <= number["high"]
    for name in ("output_tokens_per_s", "requests_per_s", "goodput_requests_per_s"):
        assert set(answer[name]) == {"value", "low", "high"}
    assert answer["completed"]["value"] == 18
    assert answer["load_delivered"] is True
    assert answer["p_meets_slo"] == 1.0
    assert [limit["limit"] for limit in answer["slo"]] == ["ttft<100s"]
    assert answer["config"]["max_num_seqs"] > 0
    assert answer["draws"] == 3


def test_the_same_seed_prints_the_same(
    autotune: Autotune, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = []
    for seed in ("5", "5", "6"):
        autotune("--json", "--seed", seed, "--replicas", "2", "--router", "prefix_aware")
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


def test_options_reach_the_simulation(autotune: Autotune, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[SimulateOptions] = []
    real = simulation_run.run_simulation

    def run_simulation(options: SimulateOptions, **more: Any) -> Any:
        asked.append(options)
        return real(options, **more)

    monkeypatch.setattr(simulation_run, "run_simulation", run_simulation)
    autotune(
        *("--disaggregate", "2:1", "--transfer-bandwidth", "80Gbit/s"),
        *("--transfer-latency", "2ms", "--speculative-acceptance", "0.9,0.5"),
        *("--speculative-draft-time", "1ms", "--router", "least-loaded", "--drain", "9s"),
        *("--max-num-seqs", "8", "--seed", "7"),
    )
    (options,) = asked
    assert options.disaggregate == (2, 1)
    assert options.transfer_bytes_per_s == pytest.approx(1e10)
    assert options.transfer_latency_s == pytest.approx(2e-3)
    assert options.acceptance == (0.9, 0.5)
    assert options.draft_s == pytest.approx(1e-3)
    assert (options.drain_limit, options.draws, options.seed) == (9.0, 3, 7)
    assert dict(options.knobs) == {"max_num_seqs": 8}


def test_a_folder_keeps_it(autotune: Autotune, capsys: pytest.CaptureFixture[str]) -> None:
    assert autotune("--slo", "ttft<100s", "-o", "out") == 0
    assert json.loads(Path("out/simulation.json").read_text())["p_meets_slo"] == 1.0
    assert json.loads(Path("out/run.json").read_text())["kind"] == "simulate"
    assert "Report: out/report.html" in capsys.readouterr().err
    assert "ttft" in Path("out/report.html").read_text()
    assert autotune("-o", "out") == 2
    assert "not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--router", "round-robbin"), "did you mean round_robin?"),
        (("--replicas", "0"), "number of replicas must be between 1 and"),
        (("--disaggregate", "2"), "write for instance 2:1"),
        (("--disaggregate", "2:1", "--replicas", "2"), "contradict each other"),
        (("--transfer-latency", "1ms"), "--transfer-latency goes with --disaggregate"),
        (("--disaggregate", "1:1", "--transfer-bandwidth", "9"), "is not a bandwidth"),
        (("--speculative-acceptance", "2"), "is not a chance between 0 and 1"),
        (("--speculative-draft-time", "1ms"), "goes with --speculative-acceptance"),
        (("--draws", "0"), "number of draws must be between 1 and"),
        (("--slo", "ttft<"), "SLO"),
        (("--workload", "nothing"), "neither a file nor a preset"),
        (("--recalibrate",), "--calibration and --recalibrate contradict"),
    ],
)
def test_bad_input_is_one_sentence(
    autotune: Autotune,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    sentence: str,
) -> None:
    assert autotune(*arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert sentence in shown.err
    assert "Traceback" not in shown.err


def test_a_rate_of_zero_and_a_broken_calibration(
    autotune: Autotune, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert autotune(rate="0") == 2
    assert "--rate '0' is not a rate" in capsys.readouterr().err
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    assert autotune(costs=("--calibration", str(broken))) == 2
    assert "broken.json" in capsys.readouterr().err
    assert autotune(costs=("--gpu", "h10")) == 2
    assert "unknown GPU 'h10'" in capsys.readouterr().err
