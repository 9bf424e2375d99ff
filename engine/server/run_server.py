"""A server from an `EngineConfig` until it is asked to end."""

from __future__ import annotations

import gc
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from engine.config import EngineConfig
from engine.loading import LoadedModel, load_model
from engine.runner import set_threads
from engine.server.app import create_app
from engine.server.async_engine import AsyncEngine
from engine.server.draining_server import DrainingServer, uvicorn_config
from engine.server.listening import address_of, allow_open_files, listening
from engine.server.served_model import ServedModel
from engine.server.settings import ServerSettings

# A waiting thread is let in after so long: the loop's part of a token is some microseconds.
_SWITCH_INTERVAL_S = 0.0005


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
    with listening(settings) as listener:  # before the model is loaded: a port in use shows now
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
    server = DrainingServer(
        uvicorn_config(app, settings, lifespan=True),
        engine,
        drain_s=settings.drain_s,
        ready=lambda: say(f"serving {model.name} at {address_of(settings, listener)}"),
        say=say,
    )
    allow_open_files()
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
