"""A replica's process: started, watched, and started again when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import ClientError

from engine.errors import EngineError, EnvironmentLacks
from engine.server.replica import Replica
from engine.server.replica_main import Arguments, read_error
from engine.server.router_metrics import cache_tokens

_ROOT = Path(__file__).resolve().parents[2]
_LAST_LINES = 5
_LAST_WORDS_S = 1.0


@dataclass(frozen=True, slots=True)
class Launch:
    """How a replica's process is started: `environment` joins the router's own."""

    arguments: Arguments
    environment: Mapping[str, str] = field(default_factory=dict)
    # -P: what lies in the folder that the router was started in must not be imported.
    command: tuple[str, ...] = (sys.executable, "-P", "-m", "engine.server.replica_main")

    def whole_environment(self) -> dict[str, str]:
        """The router's environment and the replica's own; this release is found first."""
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **self.environment}


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long what may take; seconds.

    Args:
        start: from a process's start until it is healthy.
        poll: between two looks at whether it is healthy yet.
        health_every: between two looks at whether it still is.
        health: an answer of `/health`.
        unwell: how long `/health` may fail until the process is ended and started again.
        stop: from the request to end to the end.
        restart: the first wait before a new start; each further one is twice as long.
        most_restart: the longest such wait.
        steady: after being healthy for so long, earlier deaths are forgotten.
    """

    start: float = 1800.0
    poll: float = 0.05
    health_every: float = 1.0
    health: float = 5.0
    unwell: float = 15.0
    stop: float = 10.0
    restart: float = 0.5
    most_restart: float = 30.0
    steady: float = 60.0


class ReplicaProcess:
    """Keeps one replica running until it is closed.

    Args:
        replica: is told where the process answers, and whether it can be sent requests.
        launch: how it is started.
        folder: where its sockets are; nobody else should be able to reach them.
        patience: how long what may take.
        say: told what a person should know.
    """

    def __init__(
        self,
        replica: Replica,
        launch: Launch,
        folder: Path,
        *,
        patience: Patience | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.replica = replica
        self.pid: int | None = None
        self._launch = launch
        self._folder = folder
        self._patience = patience or Patience()
        self._say = say
        self._lives = 0
        self._error: EngineError | None = None
        self._kind: type[EngineError] = EngineError
        self._last_lines: deque[str] = deque(maxlen=_LAST_LINES)

    async def keep_running(self, first_ready: asyncio.Future[None]) -> None:
        """Start the process, and again whenever it ends, until this is cancelled.

        `first_ready` gets a result once it is healthy for the first time, or the reason why it
        never was; then it is not started again.
        """
        try:
            await self._keep_running(first_ready)
        finally:
            first_ready.cancel()

    async def _keep_running(self, first_ready: asyncio.Future[None]) -> None:
        patience = self._patience
        wait = patience.restart
        while True:
            began = time.monotonic()
            reason = await self._live(first_ready)
            if not first_ready.done():
                text = f"replica {self.replica.number} {reason}"
                first_ready.set_exception(self._kind(text))
                return
            if time.monotonic() - began >= patience.steady:
                wait = patience.restart
            self._say(f"replica {self.replica.number} {reason}; it is started again in {wait:g} s")
            await asyncio.sleep(wait)
            wait = min(2 * wait, patience.most_restart)
            self.replica.restarts += 1

    async def _live(self, first_ready: asyncio.Future[None]) -> str:
        """One life of the process; returns why it is over."""
        replica = self.replica
        socket = self._folder / f"{replica.number}-{self._lives}"
        self._lives += 1
        self._error = None
        self._kind = EngineError
        self._last_lines.clear()
        try:
            process = await asyncio.create_subprocess_exec(
                *self._launch.command,
                stdin=PIPE,
                stdout=PIPE,
                stderr=PIPE,
                env=self._launch.whole_environment(),
                # Ctrl-C reaches the router, which decides what becomes of the replicas.
                start_new_session=True,
            )
        except OSError as error:  # too many processes or open files, which may pass
            self._kind = EnvironmentLacks
            return f"cannot be started: {error.strerror or error}"
        replica.state = "starting"
        self.pid = process.pid
        reading = [asyncio.ensure_future(r) for r in (self._answers(process), self._log(process))]
        watching = asyncio.ensure_future(self._watch(socket, first_ready))
        ending = asyncio.ensure_future(process.wait())
        try:
            assert process.stdin is not None
            with contextlib.suppress(OSError):  # it died at once; its end tells
                process.stdin.write(self._launch.arguments.line(socket))
                await process.stdin.drain()
            await asyncio.wait({watching, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not watching.done():
                # What it started may hold its pipes open for longer.
                await asyncio.wait(reading, timeout=_LAST_WORDS_S)
                return self._why(ending.result())
            return watching.result()
        finally:
            replica.state = "down"
            watching.cancel()
            await self._end(process, ending)
            for task in reading:
                task.cancel()
            await asyncio.gather(watching, *reading, return_exceptions=True)
            await replica.disconnect()
            self.pid = None
            with contextlib.suppress(OSError):
                socket.unlink()

    async def _watch(self, socket: Path, first_ready: asyncio.Future[None]) -> str:
        """Have the replica sent requests while it is healthy; returns why it must end."""
        patience, replica = self._patience, self.replica
        await replica.connect(socket)
        limit = time.monotonic() + patience.start
        while await self._health() != 200:
            if time.monotonic() > limit:
                return f"was not healthy after {patience.start:g} s"
            await asyncio.sleep(patience.poll)
        with contextlib.suppress(ClientError, TimeoutError, OSError):
            _, page = await replica.get("/metrics", patience.health)
            tokens = cache_tokens(page)
            if tokens is not None:
                replica.sent.resize(tokens)
        replica.state = "ready"
        if not first_ready.done():
            first_ready.set_result(None)
        failed = 0
        healthy_at = time.monotonic()
        while True:
            replica.suspected.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience.health_every):
                    await replica.suspected.wait()
            status = await self._health()
            if status == 200:
                failed, healthy_at = 0, time.monotonic()
                replica.state = "ready"
                continue
            failed += 1
            # One answer that is late may be a busy machine's; a refusal is meant.
            if status is not None or failed > 1:
                replica.state = "unwell"
            if time.monotonic() - healthy_at > patience.unwell:
                return f"was not healthy for {patience.unwell:g} s"
            await asyncio.sleep(patience.poll)

    async def _health(self) -> int | None:
        """The status of `/health`; None if there is no answer."""
        try:
            return (await self.replica.get("/health", self._patience.health))[0]
        except (ClientError, TimeoutError, OSError):
            return None

    async def _answers(self, process: Process) -> None:
        assert process.stdout is not None
        async for line in _lines(process.stdout):
            self._error = read_error(line) or self._error

    async def _log(self, process: Process) -> None:
        assert process.stderr is not None
        async for line in _lines(process.stderr):
            self._last_lines.append(line)
            self._say(f"replica {self.replica.number}: {line}")

    def _why(self, code: int) -> str:
        """How a life ended, to go on a sentence that begins with the replica."""
        if self._error is not None:
            self._kind = type(self._error)
            return f"cannot serve: {self._error}"
        how = f"ended with exit status {code}"
        if code == -signal.SIGKILL:
            # Who kills a process is outside: the system for want of memory, or a person.
            self._kind = EnvironmentLacks
            how = "was killed by SIGKILL, perhaps for want of memory"
        elif code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        last = f" (last: {self._last_lines[-1]})" if self._last_lines else ""
        return how + last

    async def _end(self, process: Process, ending: asyncio.Future[int]) -> None:
        """Ask it to end, and kill it with all its processes if it does not."""
        if not ending.done():
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await asyncio.wait({ending}, timeout=self._patience.stop)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        await ending
        assert process.stdin is not None
        process.stdin.close()


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Lines of a stream until it ends; nobody may stop reading, or the writer would wait."""
    while True:
        try:
            line = await stream.readline()
        except ValueError:  # a line that is longer than the reader takes; what is left follows
            continue
        if not line:
            return
        yield line.decode(errors="replace").rstrip()
