"""A server that a command of the user's restarts, against a fake vLLM."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from autotune.errors import BadInput
from autotune.external.engine import ExternalEngine, running_engine
from autotune.external.failures import LaunchFailed
from autotune.external.launch import launch
from tests.autotune.external.fake_vllm import install
from tests.autotune.external.test_launch import asked, wait_for


@contextmanager
def restarted_elsewhere(tmp_path: Path) -> Iterator[ExternalEngine]:
    """An engine that a script starts outside of any keeper, as a service manager does."""
    program, port = install(tmp_path), free_port()
    script, pids = tmp_path / "restart.sh", tmp_path / "server.pid"
    script.write_text(
        f"[ -f {pids} ] && kill $(cat {pids}) && sleep 0.3\n"
        f"setsid {program} serve m --host 127.0.0.1 --port {port} $1 >/dev/null 2>&1 </dev/null &\n"
        f"echo $! > {pids}\n"
    )
    words = ("sh", "-c", f"sh {script} '{{flags}}'")
    try:
        yield running_engine("vllm", f"http://127.0.0.1:{port}", words, device="cpu")
    finally:
        with contextlib.suppress(OSError):
            os.kill(int(pids.read_text()), signal.SIGKILL)


def test_a_restart_command_that_stays(tmp_path: Path) -> None:
    program, port = install(tmp_path), free_port()
    words = f"{program} serve m --host 127.0.0.1 --port {port} {{flags}}".split()
    engine = running_engine("vllm", f"http://127.0.0.1:{port}/", words, device="cpu")
    with launch(engine, {"max_num_seqs": 3}, log_file=tmp_path / "log") as server:
        assert server.pid is not None
        assert psutil.Process(server.pid).cmdline()[-2:] == ["--max-num-seqs", "3"]
        assert server.model == "m"
    assert not server.healthy()


def test_a_restart_command_that_returns(tmp_path: Path) -> None:
    """The old server answers until the command has returned, and must not be taken for the new."""
    seen = []
    with restarted_elsewhere(tmp_path) as engine:
        for eager in (True, False):
            with launch(engine, {"enforce_eager": eager}, log_file=tmp_path / "log") as server:
                wait_for(lambda running=server: running.pid is None)  # type: ignore[misc]
                seen.append(asked(server.url, "/pid")["pid"])
                assert server.failure() is None
            assert asked(server.url, "/pid")["pid"] == seen[-1], "it is not ours to end"
    assert len(set(seen)) == 2


def test_a_server_elsewhere_that_dies_has_failed(tmp_path: Path) -> None:
    with (
        restarted_elsewhere(tmp_path) as engine,
        launch(engine, {}, log_file=tmp_path / "log") as server,
    ):
        wait_for(lambda: server.pid is None)
        os.kill(asked(server.url, "/pid")["pid"], signal.SIGKILL)
        wait_for(lambda: server.failure() is not None)
        failure = server.failure()
        assert failure is not None
        assert failure.kind == "crash"
        assert f"{server.url} is healthy no more" in failure.reason


def test_a_restart_command_that_fails(tmp_path: Path) -> None:
    words = ("sh", "-c", "echo error: no such unit >&2; exit 5; {flags}")
    engine = running_engine("vllm", f"http://127.0.0.1:{free_port()}", words, device="cpu")
    with pytest.raises(LaunchFailed, match="exit status 5: error: no such unit"):
        launch(engine, {}, log_file=tmp_path / "log")


def test_another_model_at_the_url(tmp_path: Path) -> None:
    program, port = install(tmp_path), free_port()
    words = f"{program} serve m --host 127.0.0.1 --port {port} {{flags}}".split()
    url = f"http://127.0.0.1:{port}"
    engine = running_engine("vllm", url, words, device="cpu", served_name="other")
    with pytest.raises(LaunchFailed, match="serves m and not other") as caught:
        launch(engine, {}, log_file=tmp_path / "log")
    assert caught.value.failure.kind == "model_not_found"


def test_a_restart_command_needs_a_place_for_flags() -> None:
    with pytest.raises(BadInput, match=r"has no \{flags\}"):
        running_engine("vllm", "http://127.0.0.1:1", ["systemctl", "restart", "vllm"])


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
