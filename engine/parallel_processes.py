"""The processes of the ranks that are not the driver: started, watched, and ended with it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine.errors import EngineError, EnvironmentLacks
from engine.parallel_messages import read_answer

# What a rank that was asked to end gets before it is killed, and what its death gets to be noticed
# once its connection broke; seconds.
_PATIENCE = 5.0
_PIPE_BYTES = 1 << 20
# Exit status of a rank that lost the others: one of them is the cause, and noticed soon.
LOST = 3


class WorkerProcesses:
    """The ranks 1 to `size - 1`, each a `python -m engine.parallel_worker`.

    A thread for each waits for its answers and its end. The first failure is kept, `on_failure` is
    called in that thread, and the other processes are killed: they would wait for ever.

    Workers end when the driver does, however it ends: each holds one end of a pipe whose other end
    is the driver's alone.
    """

    def __init__(
        self,
        size: int,
        on_failure: Callable[[], None],
        command: Sequence[str] = (sys.executable, "-m", "engine.parallel_worker"),
    ) -> None:
        self.size = size
        self._command = tuple(command)
        self.failure: EngineError | None = None
        self._on_failure = on_failure
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._loaded: set[int] = set()
        self._changed = threading.Condition()
        self._closed = False
        self._lifeline, self._drivers_end = os.pipe()

    def start(self, arguments: dict[str, Any]) -> None:
        """Start all of them; `arguments` are plain JSON, as `engine.parallel_worker` takes them."""
        root = str(Path(__file__).resolve().parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        try:
            for rank in range(1, self.size):
                own = {**arguments, "rank": rank, "size": self.size, "lifeline": self._lifeline}
                self._processes[rank] = subprocess.Popen(
                    [*self._command, json.dumps(own)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=environment,
                    pass_fds=(self._lifeline,),
                    # Ctrl-C reaches the driver, which decides what becomes of the others.
                    process_group=0,
                )
                _widen(self._processes[rank])
                threading.Thread(
                    target=self._watch, args=(rank,), name=f"rank {rank}", daemon=True
                ).start()
        finally:
            os.close(self._lifeline)

    def pids(self) -> dict[int, int]:
        """The process of each rank."""
        return {rank: process.pid for rank, process in self._processes.items()}

    def wait_until_loaded(self) -> None:
        """Wait for all weights.

        Raises:
            EngineError: a rank failed; of the type that it raised.
        """
        with self._changed:
            everyone = self.size - 1
            self._changed.wait_for(
                lambda: self.failure is not None or len(self._loaded) == everyone
            )
        self.check()

    def check(self) -> None:
        """Raise the failure, if there is one.

        Raises:
            EngineError: a rank failed.
        """
        if self.failure is not None:
            # A new one, whose traceback is not that of all who met it.
            raise type(self.failure)(str(self.failure))

    def send(self, message: bytes) -> None:
        """Write a message to all of them.

        Raises:
            EngineError: a rank failed.
        """
        self.check()
        for rank, process in self._processes.items():
            assert process.stdin is not None
            try:
                process.stdin.write(message)
                process.stdin.flush()
            except (OSError, ValueError):
                self.explain(EngineError(f"rank {rank} of {self.size} does not read any more"))

    def explain(self, error: Exception) -> None:
        """Raise why the ranks are lost, as the one that failed has it: death shows here later.

        Raises:
            EngineError: always.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.failure is not None, _PATIENCE)
        self.fail(error if isinstance(error, EngineError) else EngineError(str(error)))
        self.check()

    def fail(self, error: EngineError) -> None:
        """Give up all ranks for a reason; the first counts."""
        with self._changed:
            if self.failure is not None or self._closed:
                return
            self.failure = error
            self._changed.notify_all()
        self._kill()
        self._on_failure()

    def close(self) -> None:
        """End all of them; they get a moment to do it themselves."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            if self.failure is None:
                self.failure = EngineError("the model was closed: load it again")
            self._changed.notify_all()
        os.close(self._drivers_end)
        for process in self._processes.values():
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
        deadline = time.monotonic() + _PATIENCE
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        self._kill()
        for process in self._processes.values():
            process.wait()

    def _kill(self) -> None:
        for process in self._processes.values():
            with contextlib.suppress(OSError):
                process.kill()

    def _watch(self, rank: int) -> None:
        process = self._processes[rank]
        assert process.stdout is not None
        with process.stdout as answers:
            for line in answers:
                failure = read_answer(line)
                if failure is not None:
                    self.fail(failure)
                    continue
                with self._changed:
                    self._loaded.add(rank)
                    self._changed.notify_all()
        code = process.wait()
        if code == LOST:
            with self._changed:
                self._changed.wait_for(lambda: self.failure is not None, _PATIENCE)
        # Who kills a process is outside: the system for want of memory, or a person.
        kind = EnvironmentLacks if code == -signal.SIGKILL else EngineError
        self.fail(
            kind(
                f"rank {rank} of {self.size} (process {process.pid}) {_ending(code)}: load the "
                "model again"
            )
        )


def _widen(process: subprocess.Popen[bytes]) -> None:
    """Let a whole step fit into the pipe, so that the driver need not wait until it is read."""
    assert process.stdin is not None
    with contextlib.suppress(OSError, AttributeError):  # Linux alone has it, up to a limit
        fcntl.fcntl(process.stdin.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


def _ending(code: int) -> str:
    if code == -signal.SIGKILL:
        return "was killed by SIGKILL, perhaps for want of memory"
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit status {code}"
