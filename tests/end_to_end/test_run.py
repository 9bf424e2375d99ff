"""The main job on the embedded model: run, be killed, resume, be interrupted."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autotune.embedded import DRAFT, TARGET
from autotune.hardware.detect import describe_hardware
from autotune.profiling.file import read_profile
from autotune.records import RunFolder
from autotune.search import probing
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
# Short answers and windows: a run is mostly what it does between its loads.
# A cache of its default size takes longer to clear than these loads take.
SMALL = ("--kv-cache-memory-bytes", str(1 << 26))
LOAD = ("--rate", "8", "--duration", "1s", "--scale-lengths", "0.1", *SMALL, "--rounds", "2")
SHORT = ("run", "--slo", "ttft<20s,tpot<5s", *LOAD, "--finalists", "1")
SEATS = ("--search", "max_num_seqs=2,256")


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


@pytest.fixture
def unread(tmp_path: Path) -> str:
    """The embedded model without its tokenizer, so that no trial scores the held-out text."""
    folder = tmp_path / "model"
    shutil.copytree(TARGET, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    return str(folder)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes, advice and forecasts of some seconds: without a budget they take a minute."""
    monkeypatch.setattr(probing, "MAX_PROBES_S", 2.0)
    monkeypatch.setattr(probing, "MAX_CONCLUSIONS_S", 3.0)


def test_run_leaves_a_verdict_a_report_and_configs(
    tmp_path: Path, in_process: Autotune, hasty: None
) -> None:
    path = tmp_path / "out"
    several = (*SEATS, *QUANTIZED, "--trials", "3", "--model", str(DRAFT))
    done = in_process(*SHORT, *several, "-o", str(path), "--json")
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
    bench = in_process("bench", "--config", deployed, *LOAD[:-2], "--json")
    assert bench.returncode in (0, 4), bench.stderr
    assert EngineConfig.from_mapping(json.loads(bench.stdout)["config"]) == config

    again = in_process("run", "--resume", str(path), "--json")
    assert again.returncode == 0
    assert json.loads(again.stdout)["gain"] == answer["gain"]
    assert folder.read_trials() == trials


def test_run_that_is_interrupted_and_killed_goes_on_where_it_was(
    tmp_path: Path, autotune: Autotune, in_process: Autotune, unread: str
) -> None:
    """One of its configurations does not fit, which is a failed trial and not the end."""
    path = tmp_path / "out"
    folder = RunFolder(path)
    space = tmp_path / "space.yaml"
    space.write_text(f"kv_cache_memory_bytes: [1, {1 << 26}]\nmax_num_seqs: [2, 256]\n")
    process = started(
        *(*SHORT, "--trials", "3", "-o", str(path), "--no-advice", "--sampler", "tpe"),
        *("--space", str(space), "--model", unread),
    )
    wait_until(lambda: len(folder.read_trials()) >= 1, process)
    refused = in_process("run", "--resume", str(path))
    assert refused.returncode == 2
    assert "another process is working" in refused.stderr
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
    failed = [t for t in after if t.outcome != "ok"]
    assert failed
    assert all(t.config["kv_cache_memory_bytes"] == 1 and t.reason for t in failed)
    assert all(folder.read_requests(t.number) for t in after if t.outcome == "ok")
    assert folder.read_run()["status"] == "done"


def test_slo_that_nothing_can_meet_ends_with_4(
    tmp_path: Path, in_process: Autotune, hasty: None, unread: str
) -> None:
    path = tmp_path / "out"
    done = in_process(
        # Requests may be sent a tenth of the TTFT late, so that a busy machine delivers the load:
        # one that it cannot deliver has no verdict.
        *("run", "--slo", "ttft<20s,tpot<1us", "--load", "0.15", *LOAD[4:], "--duration", "2s"),
        *("--trials", "1", "--sampler", "tpe", "-o", str(path), "--model", unread),
    )
    assert done.returncode == 4, done.stderr
    assert "does not meet the SLO" in done.stdout
    # The report says what would.
    (infeasible,) = RunFolder(path).read_run()["result"]["infeasible"]
    assert infeasible["limit"] == "tpot<1us"
    assert infeasible["relaxations"]
    assert infeasible["proof"] in done.stdout
    # The calibration offered all at once; the trials after it, in the same process, do not.
    calibration, *others = RunFolder(path).read_trials()
    assert calibration.kind == "calibration"
    assert calibration.rate is None
    assert [t.outcome for t in others] == ["ok"] * 3
    offered = RunFolder(path).read_run()["workload"]["rate"]
    assert all(t.rate == pytest.approx(offered, rel=0.5) for t in others)


def test_capacity_is_a_rate_that_was_measured_to_hold(
    tmp_path: Path, in_process: Autotune, unread: str
) -> None:
    path = tmp_path / "out"
    done = in_process(
        *("run", "--objective", "capacity", "--slo", "ttft<30s", *LOAD, "--trials", "1"),
        *("-o", str(path), "--no-advice", "--sampler", "tpe", "--json", "--model", unread),
    )
    assert done.returncode == 0, done.stderr
    trial: Any = RunFolder(path).read_trials()[0]
    assert trial.objective == trial.metrics["offered_rate"] > 0
    assert trial.slo_met
