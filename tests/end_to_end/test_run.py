"""The main job on the embedded model: run, be killed, resume, be interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autotune.hardware.detect import describe_hardware
from autotune.profiling.file import read_profile
from autotune.records import RunFolder
from autotune.search.methods_offered import offer_for
from autotune.search.objective import Objective
from autotune.search.proof import ranked
from engine.config import EngineConfig
from engine.quantize.method_table import METHODS
from tests.end_to_end.conftest import ENTRY, ENVIRONMENT, Autotune

# What this machine runs fast; on one that runs nothing faster than floats, floats alone.
OFFERED = offer_for(describe_hardware("cpu"), quantized=False).values["quantization"]
PLAIN = ",".join(name for name in OFFERED if not METHODS[name].calibrated)
QUANTIZED = ("--search", f"quantization={PLAIN}")
SHORT = (
    *("run", "--slo", "ttft<20s,tpot<5s", "--rate", "3", "--duration", "2s", "--rounds", "2"),
    *("--finalists", "1", "--search", "max_num_seqs=2,256"),
)
FLOATS = ("--search", "quantization=none")


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return started(*SHORT, *FLOATS, "-o", str(folder), *arguments)


def started(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*ENTRY, *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children_of(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()]


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_run_leaves_a_verdict_a_report_and_configs(tmp_path: Path, autotune: Autotune) -> None:
    path = tmp_path / "out"
    done = autotune(*SHORT, *QUANTIZED, "--trials", "3", "-o", str(path), "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["slo_met"] is True
    assert answer["trials"] == 3
    assert answer["gain"]["low"] <= answer["gain"]["value"] <= answer["gain"]["high"]

    folder = RunFolder(path)
    trials = folder.read_trials()
    search = [t for t in trials if t.kind == "search"]
    proof = [t for t in trials if t.kind == "proof"]
    assert search[0].source == "default"
    assert len(proof) == 4
    # Interleaved, each round beginning with another contender.
    assert [t.round for t in proof] == [0, 0, 1, 1]
    assert proof[0].config == search[0].config == proof[3].config
    best = ranked(search[1:], Objective("goodput"))[0]
    assert proof[1].config == best.config
    run = folder.read_run()
    assert run["status"] == "done"
    assert run["result"]["baseline"]["completed"] == sum(
        r.completed for t in (proof[0], proof[3]) for r in folder.read_requests(t.number)
    )
    config = EngineConfig.from_mapping(run["result"]["winner_config"])
    assert config.max_num_seqs in (2, 256)
    # What the default's trial shows is on disk, and what followed from it was scored.
    assert run["advice"]["given"], run["advice"]["reason"]
    assert read_profile(path).source.trial == 0
    assert json.loads(folder.diagnosis_json.read_text())["findings"]
    advised = json.loads(folder.advice_json.read_text())["advice"]
    testable = [item["technique"] for item in advised if item["testable"]]
    board = run["result"]["scoreboard"]
    assert [e["technique"] for e in (board or {"entries": []})["entries"]] == testable
    assert answer["scoreboard"] == board
    assert {p.name for p in (path / "deploy").iterdir()} >= {"engine.yaml", "vllm.yaml"}
    assert not (path / "parts").exists()
    assert run["result"]["verdict"] in (path / "report.html").read_text().replace("&#39;", "'")

    deployed = str(path / "deploy" / "engine.yaml")
    bench = autotune("bench", "--config", deployed, "--rate", "3", "--duration", "2s", "--json")
    assert bench.returncode in (0, 4), bench.stderr
    assert EngineConfig.from_mapping(json.loads(bench.stdout)["config"]) == config

    again = autotune("run", "--resume", str(path), "--json")
    assert again.returncode == 0
    assert json.loads(again.stdout)["gain"] == answer["gain"]
    assert folder.read_trials() == trials


def test_run_that_is_interrupted_and_killed_goes_on_where_it_was(
    tmp_path: Path, autotune: Autotune
) -> None:
    path = tmp_path / "out"
    folder = RunFolder(path)
    process = start(path, "--trials", "3", "--no-advice", "--sampler", "tpe")
    wait_until(lambda: len(folder.read_trials()) >= 1, process)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 130, messages
    assert f"autotune run --resume {path}" in messages
    assert folder.read_run()["status"] == "interrupted"
    assert (path / "report.html").exists()
    assert not [p for p in path.iterdir() if p.name.endswith(".part")]

    process = started("run", "--resume", str(path))
    wait_until(lambda: len(folder.read_trials()) >= 2, process)
    children = children_of(process.pid)
    assert children
    process.kill()
    process.communicate()
    before = folder.read_trials()
    deadline = time.monotonic() + 10
    while any(running(child) for child in children):
        assert time.monotonic() < deadline, "the trial process outlived the search"
        time.sleep(0.05)
    with folder.trials_jsonl.open("a") as file:
        file.write('{"number": 99, "kind": "sea')  # as a crash in the middle of a write leaves it

    done = autotune("run", "--resume", str(path), "--json")
    assert done.returncode == 0, done.stderr
    after = folder.read_trials()
    assert after[: len(before)] == before
    assert sum(t.kind == "search" for t in after) == 3
    assert [t.number for t in after] == list(range(len(after)))
    assert all(folder.read_requests(t.number) for t in after)
    assert folder.read_run()["status"] == "done"


def test_config_that_does_not_fit_is_a_failed_trial_and_not_the_end(
    tmp_path: Path, autotune: Autotune
) -> None:
    path = tmp_path / "out"
    space = tmp_path / "space.yaml"
    space.write_text(f"kv_cache_memory_bytes: [1, {1 << 26}]\n")
    done = autotune(
        *(*SHORT, *FLOATS, "--trials", "2", "-o", str(path), "--json"),
        *("--no-advice", "--sampler", "tpe"),
        *("--search", "max_num_seqs=256", "--space", str(space)),
        *("--kv-cache-memory-bytes", str(1 << 26)),
    )
    assert done.returncode == 0, done.stderr
    failed = [t for t in RunFolder(path).read_trials() if t.outcome != "ok"]
    assert failed
    assert all(t.config["kv_cache_memory_bytes"] == 1 and t.reason for t in failed)


def test_slo_that_nothing_can_meet_ends_with_4(tmp_path: Path, autotune: Autotune) -> None:
    path = tmp_path / "out"
    done = autotune(
        *("run", "--slo", "ttft<1us", "--load", "0.5", "--duration", "2s", "--rounds", "2"),
        *("--trials", "1", "--sampler", "tpe", "-o", str(path)),
    )
    assert done.returncode == 4, done.stderr
    assert "does not meet the SLO" in done.stdout
    # The report says what would.
    (infeasible,) = RunFolder(path).read_run()["result"]["infeasible"]
    assert infeasible["limit"] == "ttft<1us"
    assert infeasible["relaxations"]
    assert infeasible["proof"] in done.stdout
    # The calibration offered all at once; the trials after it, in the same process, do not.
    calibration, *others = RunFolder(path).read_trials()
    assert calibration.kind == "calibration"
    assert calibration.rate is None
    assert [t.outcome for t in others] == ["ok"] * 3
    offered = RunFolder(path).read_run()["workload"]["rate"]
    assert all(t.rate == pytest.approx(offered, rel=0.5) for t in others)


def test_capacity_is_a_rate_that_was_measured_to_hold(tmp_path: Path, autotune: Autotune) -> None:
    path = tmp_path / "out"
    done = autotune(
        *("run", "--objective", "capacity", "--slo", "ttft<30s", "--rate", "2"),
        *("--duration", "2s", "--rounds", "2", "--finalists", "1", "--trials", "1"),
        *("-o", str(path), "--no-advice", "--sampler", "tpe", "--json"),
    )
    assert done.returncode == 0, done.stderr
    trial: Any = RunFolder(path).read_trials()[0]
    assert trial.objective == trial.metrics["offered_rate"] > 0
    assert trial.slo_met


def test_second_process_in_the_folder_is_refused(tmp_path: Path, autotune: Autotune) -> None:
    path = tmp_path / "out"
    process = start(path, "--trials", "2")
    try:
        wait_until(lambda: (path / "run.json").exists(), process)
        refused = autotune("run", "--resume", str(path))
        assert refused.returncode == 2
        assert "another process is working" in refused.stderr
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
