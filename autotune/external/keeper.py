"""A process of its own that keeps a serving engine: it ends it when told to, or when we are gone.

Started by `kept_process` as a script, it reads one line of JSON from its standard input (`argv`,
`environment`, `log_file`, `pid_file`, `grace_s`, `returns`), starts the engine in a session apart
from the terminal, and answers with lines of JSON: {"started": pid} or {"error": text}, and at the
end {"ended": status}. When its input says `stop` or closes, which happens however we end, it stops
the engine and everything that came of it: workers that renamed themselves, or that lost their
parent, are known by their descent and session and not by their names.

With `returns` it keeps a command that may start a server for others to keep: what is left when the
command has ended by itself is none of ours.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.1
# What workers get to end by themselves once the engine has.
_STRAGGLERS_S = 1.0
_KILLING_S = 10.0


class _Kept:
    """The engine's process, and those that descend from it."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.status: int | None = None
        with Path(order["log_file"]).open("ab") as log:
            child = subprocess.Popen(
                order["argv"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=order["environment"],
                # A group of its own within the keeper's session: its workers stay in the session.
                process_group=0,
            )
        self.pid = child.pid
        # Its status is taken by `reap`, together with those of adopted processes.
        child.returncode = 0
        # When memory runs out the kernel should end the engine, whose loss is only a trial's.
        with contextlib.suppress(OSError):
            Path(f"/proc/{self.pid}/oom_score_adj").write_text("1000", encoding="ascii")

    def reap(self) -> bool:
        """Take the status of whatever has ended; whether the engine itself has."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                pid = 0
            if pid == 0:
                return self.status is not None
            if pid == self.pid:
                self.status = os.waitstatus_to_exitcode(status)

    def survivors(self) -> list[psutil.Process]:
        """What is left of the engine and its workers."""
        found: dict[int, psutil.Process] = {}
        with contextlib.suppress(psutil.Error):
            found = {p.pid: p for p in psutil.Process().children(recursive=True)}
        for pid in psutil.pids():
            with contextlib.suppress(OSError, psutil.Error):
                if pid not in found and pid != os.getpid() and os.getsid(pid) == os.getpid():
                    found[pid] = psutil.Process(pid)
        return [p for p in found.values() if _lives(p)]

    def wait(self, seconds: float, ended: Callable[[], bool]) -> bool:
        """Wait until something has ended; whether it has."""
        until = time.monotonic() + seconds
        while not (done := (self.reap() or True) and ended()) and time.monotonic() < until:
            time.sleep(0.02)
        return done

    def stop(self, grace_s: float) -> None:
        """End the engine as it wishes to be ended, then whatever is left of it."""
        if not self.reap():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)
            self.wait(grace_s, lambda: self.status is not None)
        self.sweep(grace_s)

    def sweep(self, grace_s: float) -> None:
        """Give the workers a moment, then kill them until there are none."""
        moment = min(grace_s, _STRAGGLERS_S)
        if self.status is not None and self.wait(moment, lambda: not self.survivors()):
            return
        until = time.monotonic() + _KILLING_S
        while time.monotonic() < until and (left := self.survivors()):
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            self.wait(0.2, lambda: not self.survivors())
        self.reap()


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _say(**message: Any) -> None:
    with contextlib.suppress(OSError):
        os.write(1, json.dumps(message).encode() + b"\n")


def _read_order() -> dict[str, Any]:
    line = b""
    while not line.endswith(b"\n"):
        chunk = os.read(0, 1 << 16)
        if not chunk:
            raise EOFError
        line += chunk
    order = json.loads(line)
    assert isinstance(order, dict)
    return order


def _write_pids(path: Path, kept: _Kept, program: str, owner: int) -> None:
    # The program alone: its arguments may hold keys.
    content = {
        "owner": owner,
        "keeper": os.getpid(),
        "keeper_created": psutil.Process().create_time(),
        "pid": kept.pid,
        "program": program,
    }
    with contextlib.suppress(psutil.Error):
        content["owner_created"] = psutil.Process(owner).create_time()
    with contextlib.suppress(psutil.Error):
        content["created"] = psutil.Process(kept.pid).create_time()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    temporary.replace(path)


def main() -> None:
    """Keep one engine until it ends or is to be ended."""
    told: list[int] = []
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    owner = os.getppid()
    try:
        order = _read_order()
    except (EOFError, ValueError):
        return
    if sys.platform == "linux" and not order["returns"]:
        # Workers whose parent is gone become our children, so that none is lost from sight.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        kept = _Kept(order)
    except OSError as error:
        _say(error=f"{order['argv'][0]} cannot be started: {error.strerror}")
        return
    pid_file = Path(order["pid_file"])
    try:
        try:
            _write_pids(pid_file, kept, order["argv"][0], owner)
        except OSError as error:
            _say(error=f"{pid_file} cannot be written: {error.strerror}")
            kept.stop(0.0)
            return
        _say(started=kept.pid)
        while not (ended := kept.reap()):
            readable, _, _ = select.select([0], [], [], _POLL_S)
            # Anything that comes means stop, and so does the end of the input.
            if readable or told or os.getppid() != owner:
                kept.stop(float(order["grace_s"]))
                break
        if ended and not order["returns"]:
            kept.sweep(float(order["grace_s"]))
    finally:
        with contextlib.suppress(OSError):
            pid_file.unlink()
    _say(ended=kept.status)


if __name__ == "__main__":
    main()
