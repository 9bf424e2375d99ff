"""A server in a process of its own, for as long as something is measured on it."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.quiet_machine import Watch

_HEALTHY_S = 120.0
_END_S = 60.0
# A look costs the starting server nothing that shows, and the time is known no better than this.
_LOOK_S = 0.01


@dataclass(frozen=True, slots=True)
class Served:
    """A server that answers: its address, process and the seconds from its start until it did."""

    url: str
    pid: int
    healthy_s: float


@contextmanager
def served(knobs: Mapping[str, Any], arguments: Sequence[str] = ()) -> Iterator[Served]:
    """Run `autotune serve` with these knobs on a free port, until the end of the block.

    Raises:
        RuntimeError: it ended by itself, or was not healthy in time; its last words are told.
    """
    with started(["-m", "autotune.cli.main", "serve", *flags_of(knobs), *arguments]) as server:
        yield server


@contextmanager
def started(arguments: Sequence[str]) -> Iterator[Served]:
    """Run Python with these arguments and a `--port` that is free, until the end of the block.

    Raises:
        RuntimeError: it ended by itself, or was not healthy in time; its last words are told.
    """
    port = free_port()
    # A terminated benchmark ends its server too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryFile("w+") as log:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *arguments, "--port", str(port)], stdout=log, stderr=subprocess.STDOUT
        )
        try:
            while not _healthy(port):
                if process.poll() is not None or time.perf_counter() - began > _HEALTHY_S:
                    log.seek(0)
                    raise RuntimeError(f"the server does not answer: {log.read()[-2000:]}")
                time.sleep(_LOOK_S)
            seconds = time.perf_counter() - began
            yield Served(f"http://127.0.0.1:{port}", process.pid, seconds)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def flags_of(knobs: Mapping[str, Any]) -> list[str]:
    """Knobs as options of the command line; None is left out."""
    flags = []
    for name, value in knobs.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            flags += [f"--{flag}", str(value)]
    return flags


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class WatchBeside:
    """How much of the machine others used, the server not counted among them.

    Args:
        pid: of the server; 0 where it does not run here.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._watch = Watch()
        self._began, self._busy = time.monotonic(), _busy_seconds(pid)

    def others(self) -> float | None:
        """The share of all cores."""
        others = self._watch.others()
        if others is None:
            return None
        busy = (_busy_seconds(self._pid) - self._busy) / (time.monotonic() - self._began)
        return max(0.0, others - busy / (os.cpu_count() or 1))


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _busy_seconds(pid: int) -> float:
    if not pid:
        return 0.0
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5.0)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
