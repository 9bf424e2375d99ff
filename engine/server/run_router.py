"""Replicas of one configuration and the router in front of them, until asked to end."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from engine.config import EngineConfig
from engine.server.auth import ApiKeys
from engine.server.body_limit import BodyLimit
from engine.server.draining_server import DrainingServer, uvicorn_config
from engine.server.listening import address_of, allow_open_files, listening
from engine.server.replica import Replica
from engine.server.replica_main import Arguments
from engine.server.replica_process import Launch, Patience, ReplicaProcess
from engine.server.replica_shares import Share, shares_of
from engine.server.router import RouterApp
from engine.server.routing import Router
from engine.server.settings import ServerSettings

_TICK_S = 0.05


def run_router(
    config: EngineConfig,
    settings: ServerSettings,
    *,
    replicas: int,
    router: Router,
    names: Sequence[str] = (),
    chat_template: Path | None = None,
    generation_defaults: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> int:
    """Serve a model by several engines until SIGTERM or SIGINT; returns the exit code.

    The machine is divided among the engines (`shares_of`). Signals do what they do to one server
    (`run_server`). An engine that dies is started again; if one cannot be started at all, nothing
    is served.

    Args:
        config: the knobs of every engine.
        settings: of the server; limits on requests that wait hold for each engine.
        replicas: how many engines.
        router: who gets which request.
        names: as `run_server` has them; so are those that follow.
        chat_template: ditto.
        generation_defaults: ditto.
        say: told when requests are served, and of what a person should know.

    Raises:
        EnvironmentLacks: the address cannot be listened on, or no device or memory for the model.
        ModelError: the model cannot be used.
        ConfigError: a knob contradicts the model.
    """
    shares = shares_of(config, replicas)
    cores = {core for share in shares for core in share.cores}
    if cores and len(cores) < replicas:
        say(f"note: {replicas} replicas share {len(cores)} cores")
    launches = [
        Launch(
            Arguments(
                config=share.config.to_dict(),
                limits=dataclasses.asdict(settings.limits),
                names=tuple(names),
                chat_template=None if chat_template is None else str(chat_template),
                generation_defaults=generation_defaults,
                drain_s=settings.drain_s,
                cores=share.cores,
            ),
            _environment(share),
        )
        for share in shares
    ]
    with (
        listening(settings) as listener,
        tempfile.TemporaryDirectory(prefix="autotune-", ignore_cleanup_errors=True) as folder,
    ):
        fleet = ReplicaFleet(launches, Path(folder), say=say)
        app = RouterApp(fleet.replicas, router)
        server = FleetServer(
            uvicorn_config(guarded(app, settings), settings, lifespan=False),
            app,
            fleet,
            drain_s=settings.drain_s,
            ready=lambda: say(f"serving {replicas} replicas at {address_of(settings, listener)}"),
            say=say,
        )
        allow_open_files()
        server.run(sockets=None if listener is None else [listener])
        if fleet.failure is not None:
            raise fleet.failure
    return 0


def guarded(app: RouterApp, settings: ServerSettings) -> ASGIApp:
    """A router behind the limits and keys of a server."""
    limits = settings.limits
    limited = BodyLimit(app, max_bytes=limits.max_body_bytes, timeout_s=limits.read_timeout_s)
    return ApiKeys(limited, settings.api_keys) if settings.api_keys else limited


class ReplicaFleet:
    """The processes of all replicas.

    Args:
        launches: how each is started.
        folder: for their sockets; only this user should be able to enter it.
        patience: how long what may take.
        say: told what a person should know.
    """

    def __init__(
        self,
        launches: Sequence[Launch],
        folder: Path,
        *,
        patience: Patience | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.replicas = [Replica(number) for number in range(len(launches))]
        self.processes = [
            ReplicaProcess(replica, launch, folder, patience=patience, say=say)
            for replica, launch in zip(self.replicas, launches, strict=True)
        ]
        self.failure: BaseException | None = None
        self._keeping: list[asyncio.Task[None]] = []
        self._closing = False

    async def start(self) -> bool:
        """Start all of them and wait until they are ready; whether they are.

        If one never is, the others are ended, and `failure` says why. To give it up, `close`.
        """
        loop = asyncio.get_running_loop()
        ready = [loop.create_future() for _ in self.processes]
        self._keeping = [
            asyncio.ensure_future(process.keep_running(first))
            for process, first in zip(self.processes, ready, strict=True)
        ]
        try:
            await asyncio.wait([*ready], return_when=asyncio.FIRST_EXCEPTION)
        finally:
            failures = [
                failure
                for first in ready
                if first.done() and not first.cancelled() and (failure := first.exception())
            ]
            self.failure = failures[0] if failures else None
            up = all(first.done() and not first.cancelled() for first in ready) and not failures
            if not up:
                await self.close()
        return up

    async def close(self) -> None:
        """End all of them."""
        # Once: a second time would interrupt those that are ending their processes.
        if not self._closing:
            self._closing = True
            for task in self._keeping:
                task.cancel()
        if self._keeping:
            await asyncio.wait(self._keeping)


class FleetServer(DrainingServer):
    """Starts the replicas before it listens, and ends them after it has drained.

    Args:
        config: uvicorn's.
        app: the router.
        fleet: its replicas' processes.
        drain_s: as `DrainingServer` has it; so are those that follow.
        ready: ditto.
        say: ditto.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        app: RouterApp,
        fleet: ReplicaFleet,
        *,
        drain_s: float,
        ready: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        super().__init__(config, app, drain_s=drain_s, ready=ready, say=say)
        self._fleet = fleet

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the replicas, then listen; a signal meanwhile ends it."""
        starting = asyncio.ensure_future(self._fleet.start())
        while not starting.done() and not self.should_exit:
            await asyncio.wait({starting}, timeout=_TICK_S)
        if not starting.done():
            await self._fleet.close()
        if not await starting:
            self.should_exit = True
            return
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close what is left of connections, then end the replicas."""
        try:
            await super().shutdown(sockets)
        finally:
            await self._fleet.close()


def _environment(share: Share) -> dict[str, str]:
    return {} if share.gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(share.gpus)}
