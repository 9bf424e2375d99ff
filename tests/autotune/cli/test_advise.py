"""`autotune advise` on what lies on disk, on a model that does not fit, and on wrong usage."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner, Result

from autotune.advise import unmeasured
from autotune.advise.commands import traffic_arguments
from autotune.cli.main import app
from autotune.embedded import TARGET
from autotune.hardware.detect import describe_hardware
from autotune.profiling.file import read_profile, write_profile
from autotune.profiling.schema import Breakdown, Profile
from autotune.records import SCHEMA_VERSION, RequestRecord, RunFolder
from engine.config import EngineConfig
from engine.step_record import StepRecord
from tests.autotune.advise import situations

_METRICS = {
    "ttft": {"mean": 0.1, "p95": 0.15},
    "tpot": {"mean": 0.12, "p95": 0.2},
    "itl": {"mean": 0.12, "p95": 0.2},
    "e2e": {"mean": 1.0, "p95": 2.0},
    "output_tokens_per_s": 100.0,
    "requests_per_s": 2.0,
    "completed": 100,
    "failed": 0,
}


def measured() -> Profile:
    """Decodes that stream weights, on a processor with AMX; TPOT is missed."""
    return situations.profile(
        engine_config=EngineConfig(model=str(TARGET), device="cpu").to_dict(),
        metrics=_METRICS,
        slo="ttft<200ms,tpot<100ms",
        breakdowns=[
            Breakdown(metric="ttft", seconds=0.1, parts={"prefill_linear": 0.9, "host": 0.1}),
            Breakdown(metric="tpot", seconds=0.12, parts={"weights": 0.9, "host": 0.1}),
            Breakdown(metric="throughput", seconds=60, parts={"weights": 0.9, "host": 0.1}),
        ],
    )


def advise(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["advise", *map(str, arguments)])


def result(*arguments: object) -> dict[str, Any]:
    found = advise(*arguments, "--json")
    assert found.exit_code == 0, found.stderr
    body: dict[str, Any] = json.loads(found.stdout)
    return body


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "profile.json"
    write_profile(path, measured())
    return path


def test_a_profile_is_advised_on_with_the_keys_that_programs_read(saved: Path) -> None:
    body = result(saved)
    assert body["binding"] == "tpot"
    assert {"metric", "bottleneck", "severity", "share", "evidence"} <= set(body["findings"][0])
    item = next(a for a in body["advice"] if a["technique"] == "int8_cpu")
    assert item["knobs"] == {"quantization": "int8"}
    assert item["problem"] == "decode_weights"
    assert item["gain"]["metric"] == "tpot"
    assert 1 < item["gain"]["low"] < item["gain"]["value"] < item["gain"]["high"] < 3
    assert item["testable"] is True
    assert body["first"] in {a["technique"] for a in body["advice"]}
    assert body["symptoms"][0] == "high_tpot" or "high_tpot" in body["symptoms"]


def test_people_read_what_binds_what_to_do_first_and_what_to_type(saved: Path) -> None:
    found = advise(saved)
    assert found.exit_code == 0
    assert "tpot<100ms binds: missed, at 2 times the limit" in found.stdout
    assert "Do first: " in found.stdout
    assert "try: autotune bench" in found.stdout
    assert "costs: " in found.stdout
    everything = advise(saved, "--all").stdout
    assert everything.count("source: ") > found.stdout.count("source: ")


def test_another_promise_changes_what_binds(saved: Path) -> None:
    body = result(saved, "--slo", "ttft<10ms")
    assert body["binding"] == "ttft"
    assert all(a["gain"] is None or a["gain"]["metric"] == "ttft" for a in body["advice"])


def test_every_command_that_is_told_is_one(saved: Path) -> None:
    commands = [shlex.split(c) for a in result(saved)["advice"] for c in a["commands"]]
    assert {"bench", "run"} <= {command[1] for command in commands}
    group: Any = get_command(app)
    for program, name, *arguments in commands:
        assert program == "autotune"
        context = group.commands[name].make_context(name, list(arguments))
        assert context.params["slo"] == "ttft<200ms,tpot<100ms"


def test_the_traffic_of_a_run_is_offered_again() -> None:
    command = "autotune bench --workload rag --rate=2 --duration 9s --keep-grid --model m -o out"
    assert traffic_arguments(command.split()) == (
        *("--workload", "rag", "--rate=2", "--duration", "9s", "--keep-grid"),
    )
    assert traffic_arguments(["autotune", "bench", "--rate"]) == ("--rate",)


def bench_folder(path: Path) -> Path:
    path.mkdir()
    folder = RunFolder(path)
    requests = [
        RequestRecord(
            f"{i:02}", 0.1 * i, 0.1 * i, (0.1 * i + 0.05, 0.1 * i + 0.06), 8, 2, 2,
            "finished", first_scheduled=0.1 * i + 0.01,
        )
        for i in range(30)
    ]  # fmt: skip
    steps = [
        StepRecord(
            start=0.05 * i, prefill_tokens=0 if i % 2 else 8, prefill_sequences=1 - i % 2,
            decode_sequences=i % 2, kv_tokens_read=9, device_seconds=0.01, host_seconds=0.001,
            scheduler_seconds=0.0005, queue_length=0, running=1, blocks_used=1, blocks_cached=0,
            blocks_total=100, preemptions=0, prefix_hit_tokens=0, drafted_tokens=0,
            accepted_tokens=0, prefill_kv_tokens_read=0 if i % 2 else 8,
            prefill_pairs=0 if i % 2 else 36, sampled_sequences=1, used_tokens=9,
        )
        for i in range(60)
    ]  # fmt: skip
    folder.write_part(0, requests, steps)
    folder.merge_parts()
    folder.write_json(path / "bench.json", _METRICS)
    run = {
        "schema_version": SCHEMA_VERSION,
        "kind": "bench",
        "command": ["autotune", "bench", "--workload", "chat", "--rate", "10"],
        "engine_config": EngineConfig(model=str(TARGET), device="cpu").to_dict(),
        "slo": "ttft<200ms,tpot<100ms",
        "hardware": describe_hardware("cpu"),
    }
    folder.write_json(folder.run_json, run)
    return path


def test_a_folder_of_records_is_profiled_and_keeps_its_advice(tmp_path: Path) -> None:
    path = bench_folder(tmp_path / "bench")
    body = result(path)
    kept = json.loads((path / "advice.json").read_text())
    assert kept["advice"] == body["advice"]
    assert (path / "diagnosis.json").exists()
    assert read_profile(path).traffic.requests == 30
    assert (path / "report.html").exists()
    commands = [c for a in body["advice"] for c in a["commands"]]
    assert all("--workload chat --rate 10" in command for command in commands)
    assert result(path)["advice"] == body["advice"]


def test_the_advice_that_a_search_began_with_is_kept(tmp_path: Path) -> None:
    path = bench_folder(tmp_path / "run")
    run = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({**run, "kind": "run"}))
    (path / "advice.json").write_text("{}")
    assert advise(path, "--slo", "ttft<1ms").exit_code == 0
    assert (path / "advice.json").read_text() == "{}"


def test_a_model_that_does_not_fit_is_advised_on_without_a_load(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = {**describe_hardware("cpu"), "memory_bytes": 4_000_000}
    monkeypatch.setattr(unmeasured, "describe_hardware", lambda _: small)
    body = result()
    assert body["symptoms"] == ["model_does_not_fit"]
    assert body["findings"][0]["bottleneck"] == "model_does_not_fit"
    assert {"distillation", "gguf_cpu"} <= {a["technique"] for a in body["advice"]}
    assert body["advice"][0]["gain"]["metric"] == "memory"
    assert body["run_folder"] is None
    assert "arithmetic alone" in body["partial"][0]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nowhere"], "does not exist"),
        (["{profile}", "--rate", "2"], "--rate has no effect"),
        (["{profile}", "--max-num-seqs", "2"], "--max-num-seqs has no effect"),
        (["{profile}", "-o", "x"], "--output has no effect"),
        (["{profile}", "--metrics-url", "http://localhost:1"], "contradict"),
        (["{profile}", "--trial", "3"], "name the run folder"),
        (["{profile}", "--price", "-1"], "--price must be above 0"),
        (["{profile}", "--slo", "fast"], "not understood"),
        (["--trial", "3"], "--trial has no effect"),
        (["--window", "5s"], "--window has no effect"),
        (["--metrics-url", "ftp://x"], "http"),
    ],
)
def test_wrong_usage_is_one_sentence(arguments: list[str], complaint: str, saved: Path) -> None:
    found = advise(*(a.format(profile=saved) for a in arguments))
    assert found.exit_code == 2, found.stderr
    assert complaint in found.stderr
    assert "Traceback" not in found.stderr


def test_a_profile_of_another_version_is_refused(saved: Path) -> None:
    raw = json.loads(saved.read_text())
    saved.write_text(json.dumps({**raw, "profile_version": 99}))
    found = advise(saved)
    assert found.exit_code == 2
    assert "profile version 99" in found.stderr


def test_an_endpoint_that_is_down_is_told() -> None:
    found = advise("--metrics-url", "http://127.0.0.1:9/metrics", "--window", "1s")
    assert found.exit_code == 3
    assert "Traceback" not in found.stderr
