"""The search's side of the trial process: starts it, sends commands, survives its death."""

from __future__ import annotations

import contextlib
import math
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import IO, Protocol

from autotune.errors import EnvironmentMissing, Interrupted
from autotune.records import RunFolder
from autotune.search.messages import (
    QUANTIZING,
    Answer,
    BrokeGuard,
    Command,
    CutShort,
    Failed,
    Lacking,
    MeasureCommand,
    Measured,
    ProbeCommand,
    Probed,
    Progress,
    decode,
    encode,
)

# Beyond a trial's own limits: loading weights, rebuilding the cache, compiling kernels, or one
# layer of a quantization that is made for the first time.
OVERHEAD_LIMIT_S = 300.0
# Probes stop by themselves where their budget ends; beyond so much of it they hang.
PROBE_EXCESS = 4.0


class TrialEvaluator(Protocol):
    """Who measures the trials of a search; records go into the run's folder."""

    def measure(self, command: MeasureCommand, time_limit: float) -> Answer:
        """Measure once; see `Evaluator.measure`."""
        ...

    def probe(self, command: ProbeCommand) -> Probed | Failed:
        """Measure what predictions rest on; see `Evaluator.probe`."""
        ...


class Evaluator:
    """Measures configurations in a child process, which is started again when it dies.

    Args:
        folder: the run; the child reads its workload windows and writes the trials' records there.
        stop: set by Ctrl-C; the measurement under way is dropped and `Interrupted` raised.
        on_progress: told what the child reports.
        argv: command line of the child, the run folder excluded.
    """

    def __init__(
        self,
        folder: RunFolder,
        stop: threading.Event,
        on_progress: Callable[[Progress], None] | None = None,
        argv: Sequence[str] = (sys.executable, "-m", "autotune.search.trial_process"),
    ) -> None:
        self._argv = tuple(argv)
        self._folder = folder
        self._stop = stop
        self._on_progress = on_progress
        self._child: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._answered = False
        self._deaths = 0

    def measure(self, command: MeasureCommand, time_limit: float) -> Answer:
        """Measure once; a crash, a hang or a lack of memory is an answer, not an exception.

        `time_limit` is what load and drain may take, in seconds. A child that quantizes weights is
        no hang as long as it tells of progress and keeps to the command's `quantize_limit`.

        Raises:
            Interrupted: `stop` was set.
            EnvironmentMissing: the child lacks something that is no fault of the configuration,
                or dies again and again before its first answer.
        """
        reply = self._ask(command, time_limit)
        assert not isinstance(reply, Probed)
        return reply

    def probe(self, command: ProbeCommand) -> Probed | Failed:
        """Measure what predictions rest on; whatever goes wrong is an answer here too.

        Raises:
            Interrupted: `stop` was set.
            EnvironmentMissing: as `measure` does.
        """
        reply = self._ask(command, PROBE_EXCESS * command.budget_s)
        assert isinstance(reply, (Probed, Failed))
        return reply

    def _ask(self, command: Command, time_limit: float) -> Answer | Probed:
        child = self._running_child()
        assert child.stdin is not None
        limit = time_limit + OVERHEAD_LIMIT_S
        quantize_limit = None
        if isinstance(command, MeasureCommand):
            quantize_limit = command.quantize_limit
        deadline, quantized_by = time.monotonic() + limit, None
        try:
            child.stdin.write(encode(command))
            child.stdin.flush()
        except OSError:
            return self._death()
        buffer = b""
        while True:
            line, buffer = self._read_line(child, buffer, deadline)
            if line is None:
                return self._death()
            if line == b"":
                self.close()
                if deadline == quantized_by and isinstance(command, MeasureCommand):
                    return Failed("timeout", _took_too_long(command))
                return Failed("timeout", f"no answer within {limit:.0f} s")
            reply = decode(line)
            if isinstance(reply, Progress):
                now = time.monotonic()
                if reply.phase == QUANTIZING:
                    if quantized_by is None and quantize_limit is not None:
                        quantized_by = now + quantize_limit
                    deadline = min(now + limit, quantized_by or math.inf)
                elif quantized_by is not None:
                    deadline, quantized_by = now + limit, None
                if self._on_progress is not None:
                    self._on_progress(reply)
            elif isinstance(reply, Lacking):
                raise EnvironmentMissing(
                    f"{reply.reason}; what was measured is kept: put that right and go on with "
                    f"autotune run --resume {self._folder.path}"
                )
            elif isinstance(reply, (Measured, Probed, BrokeGuard, CutShort, Failed)):
                self._answered = True
                return reply

    def close(self) -> None:
        """End the child; nothing it had written is lost."""
        child, self._child = self._child, None
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            for stream in (child.stdin, child.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
        if self._log is not None:
            self._log.close()
            self._log = None

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _running_child(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            self.close()
            self._log = (self._folder.path / "trials.log").open("ab")
            self._child = subprocess.Popen(
                [*self._argv, str(self._folder.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                # A group of its own: Ctrl-C reaches the search, which then ends the child.
                start_new_session=True,
            )
        return self._child

    def _read_line(
        self, child: subprocess.Popen[bytes], buffer: bytes, deadline: float
    ) -> tuple[bytes | None, bytes]:
        """The next line and what follows it; line None: the child died, empty: deadline passed."""
        assert child.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            while b"\n" not in buffer:
                if self._stop.is_set():
                    self.close()
                    raise Interrupted("stopped; what was measured is kept")
                if time.monotonic() > deadline:
                    return b"", buffer
                if selector.select(timeout=0.2):
                    chunk = os.read(child.stdout.fileno(), 1 << 16)
                    if not chunk:
                        return None, buffer
                    buffer += chunk
        line, _, rest = buffer.partition(b"\n")
        return line, rest

    def _death(self) -> Failed:
        child = self._child
        code = child.wait() if child is not None else 0
        self.close()
        self._deaths += 1
        last = self._last_log_line()
        # A trial's crash is data; a process that never gave any answer is the machine's fault.
        if not self._answered and self._deaths >= 3:
            raise EnvironmentMissing(
                f"the trial process died {self._deaths} times before its first answer ({last}); "
                f"its output is in {self._folder.path / 'trials.log'}"
            )
        if code == -signal.SIGKILL:
            return Failed(
                "out_of_memory", "the trial process was killed, most likely for want of memory"
            )
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return Failed("crash", f"the trial process died with {how}: {last}")

    def _last_log_line(self) -> str:
        try:
            lines = (self._folder.path / "trials.log").read_bytes()[-4096:].splitlines()
        except OSError:
            return "no output"
        return lines[-1].decode(errors="replace")[:300] if lines else "no output"


def _took_too_long(command: MeasureCommand) -> str:
    method = command.config.get("quantization")
    return (
        f"quantizing the weights with {method} took longer than the {command.quantize_limit:.0f} s "
        "that the budget leaves for it: raise --budget, or prepare them with autotune quantize "
        f"--method {method} and tune the checkpoint that it writes"
    )
