"""A server from an `EngineConfig` until it is asked to end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

import uvicorn

from engine.config import EngineConfig
from engine.errors import EnvironmentLacks
from engine.loading import LoadedModel, load_model
from engine.runner import set_threads
from engine.server.app import create_app
from engine.server.async_engine import AsyncEngine
from engine.server.connections import limited_protocol
from engine.server.served_model import ServedModel
from engine.server.settings import ServerSettings

# A waiting thread is let in after so long: the loop's part of a token is some microseconds.
_SWITCH_INTERVAL_S = 0.0005
_OPEN_FILES = 65536
# Health tells of a dead engine for so long before the process ends, to be started again.
_DEAD_S = 2.0
# How long answers that are complete may take to be read by their clients.
_FLUSH_S = 5
_INTERRUPTED = 130

_log = logging.getLogger(__name__)


def run_server(
    config: EngineConfig,
    settings: ServerSettings,
    *,
    names: Sequence[str] = (),
    chat_template: Path | None = None,
    generation_defaults: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> int:
    """Load a model and serve it until SIGTERM or SIGINT; returns the exit code.

    The first signal drains: nothing new is taken, what runs is finished (`settings.drain_s`), and
    the exit code is 0. A second one ends the process at once. It is 1 if the engine broke down.

    Args:
        config: the engine's knobs. `max_num_queued_reqs`, if set, is how many may wait.
        settings: the server's.
        names: what requests may call the model; the folder's name by default.
        chat_template: file of a chat template in place of the model's own.
        generation_defaults: take sampling that a request leaves out from the model's
            `generation_config.json`.
        say: told when requests are served, and of what a person should know.

    Raises:
        EnvironmentLacks: the address cannot be listened on, or no device or memory for the model.
        ModelError: the model cannot be used.
        ConfigError: a knob contradicts the model.
    """
    limits = settings.limits
    if config.max_num_queued_reqs is not None:
        # The server counts those who wait before the engine does; two counts would differ.
        limits = replace(limits, max_waiting=config.max_num_queued_reqs)
        config = config.replace(max_num_queued_reqs=None)
        settings = replace(settings, limits=limits)
    with _listening(settings) as listener:  # before the model is loaded: a port in use shows now
        loaded = load_model(config)
        try:
            for note in loaded.notes:
                say(f"note: {note}")
            model = ServedModel.of(
                loaded,
                config,
                names=names,
                chat_template=chat_template,
                generation_defaults=generation_defaults,
            )
            return _serve(loaded, config, model, settings, listener, say)
        finally:
            loaded.close()


def _serve(
    loaded: LoadedModel,
    config: EngineConfig,
    model: ServedModel,
    settings: ServerSettings,
    listener: socket.socket | None,
    say: Callable[[str], None],
) -> int:
    engine = AsyncEngine(
        loaded.engine(config),
        limits=settings.limits,
        failure=lambda: loaded.failure,
        begin_thread=lambda: _begin_thread(loaded, config),
    )
    app = create_app(engine, model, settings)
    if settings.access_log:
        _log_access()
    server = DrainingServer(
        uvicorn.Config(
            app,
            uds=settings.uds,
            http=limited_protocol(settings.limits),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=settings.access_log,
            server_header=False,
            timeout_keep_alive=max(1, round(settings.limits.keep_alive_s)),
            timeout_graceful_shutdown=_FLUSH_S,
        ),
        engine,
        drain_s=settings.drain_s,
        ready=lambda: say(f"serving {model.name} at {_address(settings, listener)}"),
        say=say,
    )
    _allow_open_files()
    with _quick_threads():
        server.run(sockets=None if listener is None else [listener])
    if engine.stepping:  # a step that does not end; the interpreter cannot end beside it
        sys.stderr.flush()
        os._exit(1)
    return 1 if engine.failed is not None else 0


def _begin_thread(loaded: LoadedModel, config: EngineConfig) -> None:
    # How many threads compute is each thread's own affair.
    runner = loaded.runner
    set_threads(config, runner.decoder.device, runner.decoder.ranks.size)


class DrainingServer(uvicorn.Server):
    """uvicorn, but it goes on answering while it drains: 503 to what is new.

    Args:
        config: uvicorn's.
        engine: drained at the first signal.
        drain_s: seconds that running requests are given.
        ready: called once requests are taken.
        say: told what becomes of a signal.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        engine: AsyncEngine,
        *,
        drain_s: float,
        ready: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        super().__init__(config)
        self._engine = engine
        self._drain_s = drain_s
        self._ready = ready
        self._say = say
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._signalled = False
        self._dead_since: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started and not self._signalled:
            self._ready()

    async def on_tick(self, counter: int) -> bool:
        """Look ten times a second whether to end."""
        if self._engine.failed is not None:
            self._dead_since = self._dead_since or time.monotonic()
            if time.monotonic() - self._dead_since > _DEAD_S:
                self._say(f"ending: {self._engine.failed}")
                self.should_exit = True
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, end at once at the second."""
        del frame
        if self._signalled:
            if self.config.uds is not None:
                with contextlib.suppress(OSError):
                    Path(self.config.uds).unlink()
            os._exit(_INTERRUPTED)
        self._signalled = True
        if self._loop is None:  # nothing was served yet
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin_draining, signal.Signals(sig).name)

    def _begin_draining(self, name: str) -> None:
        count = self._engine.num_unfinished
        self._say(
            f"{name}: finishing {count} requests, at most {self._drain_s:g} s; a second signal "
            "ends at once"
        )
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        try:
            if not await self._engine.drain(self._drain_s):
                self._say(f"requests that took longer than {self._drain_s:g} s were given up")
        finally:
            self.should_exit = True


@contextmanager
def _listening(settings: ServerSettings) -> Iterator[socket.socket | None]:
    """A socket bound to the address; None where uvicorn makes a Unix socket itself.

    Raises:
        EnvironmentLacks: the address cannot be used.
    """
    if settings.uds is not None:
        yield None
        return
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise EnvironmentLacks(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}; choose "
            "another --port, or another --host of this machine"
        ) from error
    with listener:
        yield listener


def _address(settings: ServerSettings, listener: socket.socket | None) -> str:
    if listener is None:
        return f"unix:{settings.uds}"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{listener.getsockname()[1]}"


def _allow_open_files() -> None:
    """Allow as many connections as the system lets us; often 1,024 are allowed at first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextmanager
def _quick_threads() -> Iterator[None]:
    """Short turns for the engine's thread and the loop's, and collections that skip the model."""
    interval = sys.getswitchinterval()
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(min(interval, _SWITCH_INTERVAL_S))
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        gc.unfreeze()


def _log_access() -> None:
    logger = logging.getLogger("uvicorn.access")
    logger.setLevel(logging.INFO)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)
