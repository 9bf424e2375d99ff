"""Starting, watching and ending another engine's server, against a fake vLLM."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from autotune.errors import BadInput, EnvironmentMissing, Interrupted
from autotune.external.engine import ExternalEngine
from autotune.external.failures import LaunchFailed
from autotune.external.kept_process import end_left_behind
from autotune.external.launch import launch
from autotune.external.table import load_table
from autotune.profiling.prometheus_scrape import scrape
from tests.autotune.external.fake_vllm import install

LIMIT_S = 20.0
Make = Callable[..., ExternalEngine]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    program = install(tmp_path)

    def make(fake: dict[str, Any] | None = None, **fields: Any) -> ExternalEngine:
        values: dict[str, Any] = {
            "table": load_table("vllm"),
            "program": (str(program), "serve"),
            "version": "0.32.0",
            "device": "cpu",
            "model": "some/model",
            "served_name": "model",
            "start_limit_s": LIMIT_S,
            "environment": {"FAKE_VLLM": json.dumps(fake or {})},
        }
        return ExternalEngine(**(values | fields))

    return make


def test_serves_with_the_values_and_leaves_nothing(make: Make, tmp_path: Path) -> None:
    told: list[str] = []
    log = tmp_path / "logs" / "trial.log"
    with launch(make(), {"max_num_seqs": 4}, log_file=log, say=told.append) as server:
        assert server.pid is not None
        process = psutil.Process(server.pid)
        line = process.cmdline()
        assert line[line.index("--max-num-seqs") + 1] == "4"
        assert line[line.index("--served-model-name") + 1] == server.model == "model"
        assert process.environ()["VLLM_NO_USAGE_STATS"] == "1"
        assert server.healthy()
        assert server.failure() is None
        assert server.facts["kv_cache_tokens"] == 93184
        assert scrape(server.metrics_url, 0.0).series["vllm:kv_cache_usage_perc"]
        assert server.reset_cache()
        assert asked(server.url, "/pid") == {"pid": server.pid, "resets": 1}
        assert "startup complete" in log.read_text()
        assert json.loads(log.with_suffix(".pid").read_text())["pid"] == server.pid
    assert not process.is_running()
    assert not log.with_suffix(".pid").exists()
    assert server.failure() is None, "a server that we stopped has not failed"
    assert not server.healthy()
    assert "vLLM: loading weights" in told


@pytest.mark.parametrize("deaf", [False, True])
def test_workers_are_ended_whatever_they_call_themselves(
    make: Make, tmp_path: Path, deaf: bool
) -> None:
    table = load_table("vllm").model_copy(update={"stop_grace_s": 0.3})
    engine = make({"workers": True, "deaf": deaf}, table=table)
    with launch(engine, {}, log_file=tmp_path / "log") as server:
        family = of_keeper(server.pid)
        assert len(family) == 4, [p.cmdline() for p in family]
        sessions = {os.getsid(p.pid) for p in family}
        assert len(sessions) == 3, "two workers are in sessions of their own"
    assert_gone(family)


@pytest.mark.parametrize(
    ("mode", "kind", "words"),
    [
        ("device_memory", "host_memory", "No available memory for the cache blocks"),
        ("host_memory", "host_memory", "SIGKILL"),
        ("crash", "crash", "something inside broke"),
        ("garbage", "crash", "lists no model"),
    ],
)
def test_a_start_that_fails_is_classified(
    make: Make, tmp_path: Path, mode: str, kind: str, words: str
) -> None:
    with pytest.raises(LaunchFailed) as caught:
        launch(make({"mode": mode}), {}, log_file=tmp_path / "log")
    assert caught.value.failure.kind == kind
    assert words in str(caught.value)
    assert caught.value.failure.log_tail
    assert not (tmp_path / "log.pid").exists()


def test_a_flag_that_the_engine_does_not_know(make: Make, tmp_path: Path) -> None:
    engine = make(extra_arguments=("--no-such-flag", "1"))
    with pytest.raises(LaunchFailed, match="unrecognized arguments: --no-such-flag") as caught:
        launch(engine, {}, log_file=tmp_path / "log")
    assert caught.value.failure.kind == "bad_flag"
    assert caught.value.failure.exit_status == 2


def test_values_that_break_a_rule_start_nothing(make: Make, tmp_path: Path) -> None:
    values = {"max_num_seqs": 256, "max_num_batched_tokens": 128}
    with pytest.raises(LaunchFailed, match="room for a token of each sequence") as caught:
        launch(make(), values, log_file=tmp_path / "log")
    assert caught.value.failure.kind == "bad_flag"
    assert not (tmp_path / "log").exists()


def test_too_slow_a_start_is_a_timeout(make: Make, tmp_path: Path) -> None:
    engine = make({"start_s": 60.0, "workers": True}, start_limit_s=0.7)
    with pytest.raises(LaunchFailed, match=r"within 0\.7 s; it was") as caught:
        launch(engine, {}, log_file=tmp_path / "log")
    assert caught.value.failure.kind == "timeout"


def test_a_slow_start_is_waited_for(make: Make, tmp_path: Path) -> None:
    with launch(make({"start_s": 0.8}), {}, log_file=tmp_path / "log") as server:
        assert server.started_in_s > 0.8


def test_interrupted_while_it_starts(make: Make, tmp_path: Path) -> None:
    stop = threading.Event()
    families: list[list[psutil.Process]] = []

    def interrupt() -> None:
        wait_for((tmp_path / "pids").exists)
        content = json.loads((tmp_path / "pids").read_text())
        families.append(of_keeper(content["pid"]))
        stop.set()

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Interrupted, match="while vLLM was starting"):
        launch(
            make({"start_s": 60.0}),
            {},
            log_file=tmp_path / "log",
            pid_file=tmp_path / "pids",
            stop=stop,
        )
    thread.join(LIMIT_S)
    assert families[0]
    assert_gone(families[0])


def test_a_program_that_is_not_there(make: Make, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentMissing, match="cannot be started: No such file"):
        launch(make(program=(str(tmp_path / "none"),)), {}, log_file=tmp_path / "log")


def test_a_server_that_dies_while_it_serves(make: Make, tmp_path: Path) -> None:
    with launch(make({"mode": "die_on_request"}), {}, log_file=tmp_path / "log") as server:
        with pytest.raises(OSError, match=r".*"):
            asked(server.url, "/v1/completions", {"prompt": "a"})
        wait_for(lambda: server.failure() is not None)
        failure = server.failure()
        assert failure is not None
        assert failure.kind == "host_memory"
        assert failure.exit_status == -signal.SIGKILL
        assert not server.healthy()


def test_a_port_lost_to_another_program_is_tried_again(make: Make, tmp_path: Path) -> None:
    with pytest.raises(LaunchFailed) as caught:
        launch(make({"mode": "port"}), {}, log_file=tmp_path / "log")
    assert caught.value.failure.kind == "port_in_use"
    assert (tmp_path / "log").read_text().count("address already in use") == 3


def test_a_server_that_wants_a_key(make: Make, tmp_path: Path) -> None:
    with launch(make({"key": "k"}, api_key="k"), {}, log_file=tmp_path / "log") as server:
        assert server.model == "model"
        assert "api_key" not in repr(server.engine)
    with pytest.raises(BadInput, match=r"HTTP error 401: .* --api-key-env"):
        launch(make({"key": "k"}), {}, log_file=tmp_path / "log")
    assert not (tmp_path / "log.pid").exists()


OWNER = """
import json, pathlib, sys, time
from autotune.external.engine import ExternalEngine
from autotune.external.launch import launch
from autotune.external.table import load_table
program, folder = sys.argv[1:]
engine = ExternalEngine(
    table=load_table("vllm"), program=(program, "serve"), version=None, device="cpu", model="m",
    served_name="m", environment={"FAKE_VLLM": '{"workers": true}'},
)
server = launch(engine, {}, log_file=pathlib.Path(folder, "log"))
print(server.pid, flush=True)
time.sleep(100)
"""


@contextlib.contextmanager
def owned_by_another(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that has launched an engine, and the engine's process id."""
    command = [sys.executable, "-c", OWNER, str(install(tmp_path)), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout is not None
            yield owner, int(owner.stdout.readline())
        finally:
            owner.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_outlives_us_however_we_end(tmp_path: Path, number: signal.Signals) -> None:
    with owned_by_another(tmp_path) as (owner, pid):
        family = of_keeper(pid)
        keeper = psutil.Process(pid).parent()
        assert keeper is not None
        assert len(family) == 4
        owner.send_signal(number)
        owner.wait(LIMIT_S)
        assert_gone([*family, keeper])
    assert not (tmp_path / "log.pid").exists()


def test_what_a_killed_keeper_left_is_ended_at_the_next_start(make: Make, tmp_path: Path) -> None:
    with owned_by_another(tmp_path) as (owner, pid):
        keeper = psutil.Process(pid).parent()
        assert keeper is not None
        in_session = [p for p in of_keeper(pid) if os.getsid(p.pid) == keeper.pid]
        others = [p for p in of_keeper(pid) if os.getsid(p.pid) != keeper.pid]
        keeper.kill()
        owner.kill()
        owner.wait(LIMIT_S)
        assert_gone([keeper])
        try:
            assert all(p.is_running() for p in in_session)
            with launch(make(), {}, log_file=tmp_path / "log") as server:
                assert_gone(in_session)
                assert server.pid != pid
        finally:
            for process in others:
                process.kill()


def test_an_engine_in_use_is_not_ended(make: Make, tmp_path: Path) -> None:
    with owned_by_another(tmp_path) as (_, pid):
        with pytest.raises(EnvironmentMissing, match=f"another run \\(process {pid}\\) uses"):
            launch(make(), {}, log_file=tmp_path / "log")
        assert psutil.pid_exists(pid)


def test_process_ids_that_others_have_now_are_left_alone(tmp_path: Path) -> None:
    pid_file = tmp_path / "pids"
    mine = psutil.Process()
    stale = {
        "owner": 1,
        "owner_created": 0.0,
        "keeper": mine.pid,
        "keeper_created": mine.create_time() - 100,
        "pid": mine.pid,
        "created": mine.create_time() - 99,
        "program": "vllm",
    }
    pid_file.write_text(json.dumps(stale))
    assert not end_left_behind(pid_file)
    assert not pid_file.exists()
    pid_file.write_text("no json")
    with pytest.raises(EnvironmentMissing, match="delete it"):
        end_left_behind(pid_file)


def asked(url: str, path: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url + path, data), timeout=5.0) as answer:
        return json.loads(answer.read())


def of_keeper(pid: int | None) -> list[psutil.Process]:
    """The engine and all of its workers, which the keeper has as children."""
    assert pid is not None
    keeper = psutil.Process(pid).parent()
    assert keeper is not None
    return keeper.children(recursive=True)


def assert_gone(processes: list[psutil.Process]) -> None:
    wait_for(lambda: not any(lives(p) for p in processes))


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)
