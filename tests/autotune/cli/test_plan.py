"""`autotune plan`: what is shown, how it ends, and what it leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from autotune.cli.main import main
from tests.autotune.planning import known_models as models

Autotune = Callable[..., int]
SMALL = ("--tensor-parallel-size", "1", "--quantization", "none", "--draws", "4")


@pytest.fixture
def autotune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Autotune:
    """Run the command on an 8B model of which there is only the config; returns its exit code."""
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(json.dumps(models.LLAMA_3_8B), encoding="utf-8")
    Path("large.json").write_text(json.dumps(models.LLAMA_3_70B), encoding="utf-8")

    def run(*arguments: str, rate: str | None = "5", model: str = "config.json") -> int:
        asked = () if rate is None else ("--rate", rate)
        with pytest.raises(SystemExit) as ended:
            main(["plan", "--model", model, "--workload", "summarize", *asked, *SMALL, *arguments])
        assert isinstance(ended.value.code, int)
        return ended.value.code

    return run


def test_it_shows_the_best_and_what_is_to_be_known_of_it(
    autotune: Autotune, capsys: pytest.CaptureFixture[str]
) -> None:
    assert autotune("--gpus", "h100,l40s", "--slo", "ttft<1s,tpot<60ms", "--growth", "2x/6mo") == 0
    shown = capsys.readouterr()
    for text in (
        "Best: ",
        "USD/month",
        "what binds",
        "memory, GiB",
        "break-even",
        "outgrown",
        "rate x 1.5",
        "As the rate grows",
    ):
        assert text in shown.out
    table = shown.out.split("\n\n")[1]
    assert max(map(len, table.splitlines())) <= 80
    assert "…" not in table
    assert "simulating" in shown.err
    assert "note: " in shown.err


def test_json_is_one_object_and_nothing_else(
    autotune: Autotune, capsys: pytest.CaptureFixture[str]
) -> None:
    assert autotune("--gpus", "h100", "--slo", "ttft<1s", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["schema_version"] == 1
    (option,) = told["options"]
    keys = {
        *("gpu", "tensor_parallel_size", "quantization", "fits", "replicas", "max_num_seqs"),
        *("output_tokens_per_s", "ttft", "tpot", "p_meets_slo", "usd_per_hour"),
        *("usd_per_million_tokens", "binding_constraint", "memory"),
    }
    assert keys <= set(option)


def test_a_folder_takes_the_plan_and_its_report(
    autotune: Autotune, capsys: pytest.CaptureFixture[str]
) -> None:
    assert autotune("--gpus", "h100", "--slo", "ttft<1s", "-o", "out") == 0
    told = json.loads(Path("out/plan.json").read_text(encoding="utf-8"))
    assert told["options"][0]["gpu"] == "h100-sxm"
    assert "h100-sxm" in Path("out/report.html").read_text(encoding="utf-8")
    capsys.readouterr()
    assert autotune("--gpus", "h100", "-o", "out") == 2
    assert "not empty" in capsys.readouterr().err


def test_what_fits_nowhere_ends_with_4_and_what_would_hold_it(
    autotune: Autotune, capsys: pytest.CaptureFixture[str]
) -> None:
    assert autotune("--gpus", "l40s", model="large.json") == 4
    shown = capsys.readouterr()
    assert "Nothing of this holds the model." in shown.out
    assert "l40s would hold it" in shown.out


def test_an_slo_below_the_floor_ends_with_4_and_the_floor(
    autotune: Autotune, capsys: pytest.CaptureFixture[str]
) -> None:
    assert autotune("--gpus", "h100", "--slo", "tpot<1ms") == 4
    shown = capsys.readouterr()
    assert "Nothing of this keeps the SLO." in shown.out
    assert "below the physical floor" in shown.out


@pytest.mark.parametrize(
    ("arguments", "rate", "said"),
    [
        (("--gpus", "h10"), "5", "nearest names are h100"),
        (("--gpus", "h100"), "0", "--rate '0'"),
        (("--gpus", "h100"), None, "--rate"),
        (("--gpus", "h100"), "inf", "--rate inf"),
        (("--gpus", "h100", "--growth", "soon"), "5", "--growth 'soon'"),
        (("--gpus", "h100", "--price", "h100=-1"), "5", "-1"),
        (("--gpus", "h100", "--tensor-parallel-size", "two"), "5", "--tensor-parallel-size 'two'"),
        (("--gpus", "h100", "--json", "--all"), "5", "--all has no effect with --json"),
        (("--gpus", "h100", "--load", "0.5"), None, "--load"),
        (("--gpus", "h100", "--calibration", "none.json"), "5", "none.json"),
    ],
)
def test_bad_input_ends_with_2_and_one_sentence(
    autotune: Autotune,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    rate: str | None,
    said: str,
) -> None:
    assert autotune(*arguments, rate=rate) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told


def test_a_config_that_is_none_is_refused(
    autotune: Autotune, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("broken.json").write_text("{", encoding="utf-8")
    assert autotune("--gpus", "h100", model="broken.json") == 2
    assert autotune("--gpus", "h100", model="none.json") == 2
    assert "none.json" in capsys.readouterr().err
