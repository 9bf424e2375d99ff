import json
from collections.abc import Callable

import pytest
from typer.testing import CliRunner, Result

from autotune.cli.main import app
from autotune.hardware import ceilings, examination
from autotune.hardware.ceilings import Ceilings, Rate
from autotune.hardware.checkup import Check
from autotune.hardware.examination import Findings
from kernels import limits

CEILINGS = Ceilings(
    "cpu",
    Rate(median=21.5e9, low=20e9, high=22e9),
    {"bfloat16": Rate(median=1.5e12, low=1.4e12, high=1.6e12)},
)
GOOD = [
    Check("Python", "ok", "3.12.0", required=True),
    Check("torch", "ok", "2.13.0", required=True, library=True),
    Check("rich", "ok", "15.0", library=True),
    Check("GPU", "missing", "none [/x]", "add [one]"),
]
BAD = [*GOOD, Check("tokenizers", "missing", "gone", "pip install tokenizers", True, True)]


def doctor(
    monkeypatch: pytest.MonkeyPatch,
    checks: list[Check],
    *arguments: str,
    measured: Ceilings | None = CEILINGS,
) -> Result:
    def examine(step: Callable[[str], None]) -> Findings:
        step("Looking")
        return Findings({"device": "cpu"}, {"python": "3.12.0"}, checks, measured)

    monkeypatch.setattr(examination, "examine", examine)
    return CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "80"})


def test_data_on_stdout_and_progress_on_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    result = doctor(monkeypatch, GOOD)
    assert result.exit_code == 0
    assert result.stderr == "Looking\n"
    assert "\x1b" not in result.stdout
    assert "torch 2.13.0, rich 15.0" in result.stdout
    assert "none [/x]" in result.stdout
    assert "to mend it: add [one]" in result.stdout
    assert "22.0 GB/s" in result.stdout
    assert "median 21.5, lowest 20.0" in result.stdout
    assert "1.60 TFLOP/s" in result.stdout
    assert "can run here" in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines())


def test_what_the_engine_needs_and_lacks_ends_with_3(monkeypatch: pytest.MonkeyPatch) -> None:
    result = doctor(monkeypatch, BAD, measured=None)
    assert result.exit_code == 3
    assert "cannot run here for want of tokenizers" in result.stdout
    assert "to mend it: pip install tokenizers" in result.stdout


def test_a_gpu_shows_fp8_and_what_launches_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"float8_e4m3fn": Rate.of([1.9e15])}
    measured = Ceilings("cuda", Rate.of([4e12]), rates, launch_cost=4.2e-6, graph_launch_cost=1e-6)
    result = doctor(monkeypatch, GOOD, measured=measured)
    assert "fp8 matmul" in result.stdout
    assert "4.20 µs" in result.stdout
    assert "1.00 µs from a CUDA graph" in result.stdout
    found = json.loads(doctor(monkeypatch, GOOD, "--json", measured=measured).stdout)
    assert found["limits"]["launch_cost_s"] == 4.2e-6


@pytest.mark.parametrize(("checks", "code"), [(GOOD, 0), (BAD, 3)])
def test_json(monkeypatch: pytest.MonkeyPatch, checks: list[Check], code: int) -> None:
    result = doctor(monkeypatch, checks, "--json")
    assert result.exit_code == code
    found = json.loads(result.stdout)
    assert found["schema_version"] == 1
    assert found["engine_can_run"] is (code == 0)
    assert [row["name"] for row in found["checks"]] == [check.name for check in checks]
    assert found["limits"]["memory_bandwidth_bytes_per_s"]["median"] == 21.5e9
    assert found["limits"]["matmul_operations_per_s"]["bfloat16"]["high"] == 1.6e12


def test_the_real_examination_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "SECONDS_EACH", 0.0)
    monkeypatch.setattr(ceilings, "ROUNDS", 1)
    monkeypatch.setattr(limits, "LARGEST_MATMUL", 512)
    monkeypatch.setattr(limits, "CPU_BUFFER_BYTES", 1 << 20)
    result = CliRunner().invoke(app, ["doctor", "--json"])
    found = json.loads(result.stdout)
    assert result.exit_code == (0 if found["engine_can_run"] else 3)
    assert {"Python", "torch", "processor", "memory", "disk"} <= {
        c["name"] for c in found["checks"]
    }
    assert found["hardware"]["cores"] >= 1
    assert found["limits"]["memory_bandwidth_bytes_per_s"]["median"] > 0
    assert "float32" in found["limits"]["matmul_operations_per_s"]
    for row in found["checks"]:
        assert row["status"] == "ok" or row["remedy"], row
