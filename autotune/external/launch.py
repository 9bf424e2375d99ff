"""Starting an engine with a trial's values and waiting until it serves."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from autotune.errors import BadInput, Interrupted
from autotune.external.engine import ExternalEngine
from autotune.external.failures import Failure, FailureKind, LaunchFailed
from autotune.external.flags import Flags, flags_of, problems_of
from autotune.external.kept_process import KeptProcess
from autotune.external.probes import models_of, status_of
from autotune.external.restart import RestartCommand, restart_words
from autotune.external.running import Ends, RunningServer, ServerProcess
from autotune.external.server_log import ServerLog
from autotune.external.start_watch import StartWatch
from autotune.external.table import Value
from autotune.load.received import for_people

# A port that was free may be taken by another program before the engine binds it.
_PORT_ATTEMPTS = 3


def launch(
    engine: ExternalEngine,
    values: Mapping[str, Value],
    *,
    log_file: Path,
    pid_file: Path | None = None,
    stop: threading.Event | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> RunningServer:
    """Start the engine with a trial's values and wait until it serves.

    The caller stops what comes back, best by `with`. Nothing outlives this process, however it
    ends: a keeper ends the engine, and what a killed keeper left is ended by the next `launch`
    with the same `pid_file`.

    Arguments:
        engine: what is the same for every trial.
        values: of this trial's knobs, by the engine's names; the engine's `fixed` are added.
        log_file: what the engine writes is added there.
        pid_file: where the process ids stand while it runs; without one, beside the log.
        stop: set it to give up waiting.
        say: told what is going on, a sentence at a time.

    Raises:
        LaunchFailed: it does not come to serve; its `failure` tells the class and the reason.
        BadInput: the server wants a key, or another one.
        EnvironmentMissing: its program cannot be run, or the pid file is in use.
        Interrupted: `stop` was set.
    """
    joined = {**engine.fixed, **values}
    if problems := problems_of(engine.table, joined, engine.device):
        raise LaunchFailed(Failure("bad_flag", f"not started: {'; '.join(problems)}"))
    flags = flags_of(engine.table, joined, engine.device)
    pid_file = pid_file or log_file.with_suffix(".pid")
    stop = stop or threading.Event()
    log_file.parent.mkdir(parents=True, exist_ok=True)
    attempts = _PORT_ATTEMPTS if engine.url is None else 1
    for attempt in range(1, attempts + 1):
        try:
            return _launch_once(engine, flags, log_file, pid_file, stop, say)
        except LaunchFailed as error:
            if error.failure.kind != "port_in_use" or attempt == attempts:
                raise
    raise AssertionError("unreachable")


def command_line(engine: ExternalEngine, flags: Flags, port: int) -> list[str]:
    """The words that start the engine."""
    names = {
        "model": engine.model,
        "host": engine.host,
        "port": str(port),
        "served_name": engine.served_name,
    }
    at_every_start = engine.table.start(engine.device).arguments
    arguments = [argument.format(**names) for argument in at_every_start]
    return [*engine.program, *arguments, *flags.arguments, *engine.extra_arguments]


def environment_of(engine: ExternalEngine, flags: Flags) -> dict[str, str]:
    """All variables of the engine: ours, the table's, the user's and the trial's."""
    reset = engine.table.reset_cache
    return {
        **os.environ,
        **engine.table.start(engine.device).environment,
        **(reset.environment if reset is not None else {}),
        **engine.environment,
        **flags.environment,
    }


def _launch_once(
    engine: ExternalEngine,
    flags: Flags,
    log_file: Path,
    pid_file: Path,
    stop: threading.Event,
    say: Callable[[str], None],
) -> RunningServer:
    began = time.monotonic()
    log = ServerLog(log_file)
    url, process = _start(engine, flags, log_file, pid_file)
    try:
        ends = Ends(engine, process, log)
        watch = StartWatch(engine.table, log, say)
        _wait_until_healthy(engine, process, ends, url, watch, stop, began)
        model = _served_model(engine, url, log)
    except BaseException:
        process.stop()
        raise
    return RunningServer(
        engine,
        process,
        ends,
        url=url,
        model=model,
        log=log,
        facts=watch.facts(),
        started_in_s=time.monotonic() - began,
    )


def _start(
    engine: ExternalEngine, flags: Flags, log_file: Path, pid_file: Path
) -> tuple[str, ServerProcess]:
    """The server's address and process, once it has been started."""
    grace_s = engine.table.stop_grace_s
    environment = environment_of(engine, flags)
    if engine.url is not None:
        command = RestartCommand(
            restart_words(engine.restart_command, flags),
            environment,
            health_url=engine.url + engine.table.health_path,
            api_key=engine.api_key,
            log_file=log_file,
            pid_file=pid_file,
            grace_s=grace_s,
        )
        return engine.url, command
    port = _free_port(engine.host)
    words = command_line(engine, flags, port)
    process = KeptProcess(words, environment, log_file=log_file, pid_file=pid_file, grace_s=grace_s)
    return f"http://{engine.host}:{port}", process


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as free:
        free.bind((host, 0))
        return int(free.getsockname()[1])


def _wait_until_healthy(
    engine: ExternalEngine,
    process: ServerProcess,
    ends: Ends,
    url: str,
    watch: StartWatch,
    stop: threading.Event,
    began: float,
) -> None:
    """Return when the server says that it can serve.

    Raises:
        LaunchFailed: it ended, or the time was over.
        Interrupted: `stop` was set.
    """
    health = url + engine.table.health_path
    while True:
        watch.look()
        if process.ended():
            raise LaunchFailed(ends.failure())
        counts = process.answers_count()
        healthy = status_of(health, api_key=engine.api_key) == 200
        if healthy and counts and not process.ended():
            return
        waited = time.monotonic() - began
        if waited > engine.start_limit_s:
            at = f"; it was {watch.stage}" if watch.stage else ""
            reason = (
                f"{engine.table.title} did not become healthy within {engine.start_limit_s:g} s{at}"
            )
            raise LaunchFailed(Failure("timeout", reason, None, tuple(watch.log_tail())))
        # Often at first, for small engines; rarely for those that take minutes.
        if stop.wait(min(1.0, max(0.05, waited / 20))):
            raise Interrupted(f"interrupted while {engine.table.title} was starting")


def _served_model(engine: ExternalEngine, url: str, log: ServerLog) -> str:
    """The model's name in requests.

    Raises:
        LaunchFailed: what answers is no such server, or serves another model.
        BadInput: it wants a key, or another one.
    """
    status, names = models_of(url, engine.api_key)
    if status in (401, 403):
        raise BadInput(
            f"{url}/v1/models answers with the HTTP error {status}: put the server's key into an "
            "environment variable and name it with --api-key-env"
        )
    if not names:
        reason = f"{url} is healthy and yet lists no model at /v1/models"
        raise LaunchFailed(Failure("crash", reason, None, tuple(log.tail(40))))
    if not engine.served_name:
        return names[0]
    if engine.served_name not in names:
        reason = f"{url} serves {for_people(', '.join(names))} and not {engine.served_name}"
        # At a port that we have chosen, another program's server is in the way.
        kind: FailureKind = "port_in_use" if engine.url is None else "model_not_found"
        raise LaunchFailed(Failure(kind, reason, None, tuple(log.tail(40))))
    return engine.served_name
