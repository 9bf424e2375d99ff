"""Our side of the keeper: starting an engine's process, asking how it is, ending it."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from autotune.errors import EnvironmentMissing
from autotune.external import keeper

_START_S = 30.0
# Beyond the grace that the engine gets: killing stragglers and going through the processes.
_STOP_EXCESS_S = 20.0


class KeptProcess:
    """An engine's process with its workers; nothing of it outlives us, however we end.

    Args:
        argv: the command line.
        environment: all of its variables.
        log_file: what it writes is added there.
        pid_file: holds the process ids while it runs, for `end_left_behind`.
        grace_s: seconds between asking it to end and killing it.
        returns: it is a command that may start a server elsewhere and return: what it leaves when
            it has ended by itself is not ended.

    Raises:
        EnvironmentMissing: it cannot be started at all.
    """

    def __init__(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str],
        *,
        log_file: Path,
        pid_file: Path,
        grace_s: float,
        returns: bool = False,
    ) -> None:
        end_left_behind(pid_file)
        self._grace_s = grace_s
        self._lock = threading.Lock()
        self._buffer = b""
        self._ended = False
        self._status: int | None = None
        self._keeper = subprocess.Popen(
            # -P: the modules beside the script must not stand before those of the same name.
            (sys.executable, "-P", keeper.__file__),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        order = {
            "argv": list(argv),
            "environment": dict(environment),
            "log_file": str(log_file.resolve()),
            "pid_file": str(pid_file.resolve()),
            "grace_s": grace_s,
            "returns": returns,
        }
        try:
            assert self._keeper.stdin is not None
            self._keeper.stdin.write(json.dumps(order).encode() + b"\n")
            self._keeper.stdin.flush()
            answer = self._read(_START_S)
        except BaseException:
            self.stop()
            raise
        if answer is None or "started" not in answer:
            self.stop()
            why = (answer or {}).get("error", f"{argv[0]} cannot be started: no answer")
            raise EnvironmentMissing(str(why))
        self._pid = int(answer["started"])

    @property
    def pid(self) -> int | None:
        """The engine's process."""
        return self._pid

    def ended(self) -> bool:
        """Whether the engine has ended, by itself or because it was told to."""
        while not self._ended and (answer := self._read(0.0)) is not None:
            self._note(answer)
        return self._ended

    @property
    def status(self) -> int | None:
        """The exit status, -N for the signal N; None while it runs or where it is not known."""
        return self._status

    def answers_count(self) -> bool:
        """Whether what answers at its address is this server: its port was free before."""
        return True

    def stop(self) -> None:
        """Ask it to end, then kill it and all of its workers; harmless where it has ended."""
        with contextlib.suppress(OSError):
            assert self._keeper.stdin is not None
            self._keeper.stdin.close()
        until = time.monotonic() + self._grace_s + _STOP_EXCESS_S
        while not self._ended and (left := until - time.monotonic()) > 0:
            answer = self._read(left)
            if answer is not None:
                self._note(answer)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._keeper.wait(timeout=5.0)
        if self._keeper.poll() is None:
            self._keeper.kill()
            self._keeper.wait()
            self._kill_orphans()
        with self._lock:
            if self._keeper.stdout is not None and not self._keeper.stdout.closed:
                self._keeper.stdout.close()

    def _note(self, answer: dict[str, Any]) -> None:
        if "ended" in answer:
            self._ended, self._status = True, answer["ended"]

    def _read(self, seconds: float) -> dict[str, Any] | None:
        """The keeper's next answer; None: none in time. A keeper that is gone ends the engine."""
        # One thread may stop what another looks after.
        with self._lock:
            return self._read_alone(seconds)

    def _read_alone(self, seconds: float) -> dict[str, Any] | None:
        assert self._keeper.stdout is not None
        if self._keeper.stdout.closed:
            return {"ended": self._status}
        until = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._keeper.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, until - time.monotonic())):
                    return None
                chunk = os.read(self._keeper.stdout.fileno(), 1 << 16)
                if not chunk:
                    self._keeper.wait()
                    self._kill_orphans()
                    return {"ended": self._status}
                self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer = json.loads(line)
        assert isinstance(answer, dict)
        return answer

    def _kill_orphans(self) -> None:
        """End what a keeper that was itself killed has left: all of its session."""
        _kill_session(self._keeper.pid, since=0.0)


def end_left_behind(pid_file: Path) -> bool:
    """End the engine that a run left behind whose keeper was killed too; whether there was one.

    Processes are ended only if the file's process ids and times of creation are theirs.

    Raises:
        EnvironmentMissing: the file's engine is in use by another run.
    """
    try:
        content = json.loads(pid_file.read_text(encoding="utf-8"))
        keeper_pid, keeper_created = int(content["keeper"]), float(content["keeper_created"])
        pid, created = int(content["pid"]), float(content.get("created", 0.0))
        owner = _process(int(content["owner"]), float(content.get("owner_created", 0.0)))
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        # Written whole or not at all: this is no file of ours, so that nothing may rest on it.
        raise EnvironmentMissing(
            f"{pid_file} should hold the process ids of a serving engine and does not: delete it "
            "if no engine of an earlier run is left"
        ) from None
    if (keeping := _process(keeper_pid, keeper_created)) is not None:
        # It ends by itself where its owner is gone, and is in use where not.
        with contextlib.suppress(psutil.Error):
            try:
                keeping.wait(timeout=_STOP_EXCESS_S if owner is None else 0.0)
            except psutil.TimeoutExpired:
                raise EnvironmentMissing(
                    f"a serving engine of another run (process {pid}) uses {pid_file}: let that "
                    "run end, or end it"
                ) from None
    left = _process(pid, created)
    if left is not None:
        with contextlib.suppress(psutil.Error):
            left.terminate()
            left.wait(timeout=5.0)
    found = _kill_session(keeper_pid, since=keeper_created) or left is not None
    with contextlib.suppress(psutil.Error):
        if left is not None:
            left.kill()
    with contextlib.suppress(FileNotFoundError):
        pid_file.unlink()
    return found


def _process(pid: int, created: float) -> psutil.Process | None:
    """The process of that id and time of creation, if it lives."""
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - created) < 0.05
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


def _kill_session(session: int, since: float) -> bool:
    """Kill all processes of a session that began after a time; whether there were any."""
    found = False
    for _ in range(50):
        left = []
        for pid in psutil.pids():
            with contextlib.suppress(OSError, psutil.Error):
                if os.getsid(pid) == session and pid != os.getpid():
                    process = psutil.Process(pid)
                    if process.create_time() >= since - 0.05 and (
                        process.status() != psutil.STATUS_ZOMBIE
                    ):
                        left.append(process)
        if not left:
            return found
        found = True
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        time.sleep(0.05)
    return found
