"""One replica: a server on a Unix socket, for a router that started it.

Run as `python -m engine.server.replica_main`. The first line of standard input is JSON of
`Arguments`; the input ends when the router does, however it ends, and so does the replica. If it
cannot serve, the last line of standard output says why.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.errors import ConfigError, EngineError, EnvironmentLacks, ModelError, first_line
from engine.server.limits import ServerLimits
from engine.server.settings import ServerSettings

_ERRORS = {error.__name__: error for error in (ConfigError, ModelError, EnvironmentLacks)}


@dataclass(frozen=True, slots=True)
class Arguments:
    """What a replica is started with, as plain JSON values.

    `cores` are those that it may run on; none leaves it all. The rest are the arguments of
    `run_server`.
    """

    config: dict[str, Any]
    limits: dict[str, Any]
    uds: str = ""
    names: tuple[str, ...] = ()
    chat_template: str | None = None
    generation_defaults: bool = True
    drain_s: float = 30.0
    cores: tuple[int, ...] = ()

    def line(self, uds: Path) -> bytes:
        """The line that a replica on this socket is started with."""
        fields = dataclasses.asdict(dataclasses.replace(self, uds=str(uds)))
        return json.dumps(fields).encode() + b"\n"


def error_line(error: BaseException) -> str:
    """The line that says why a replica cannot serve."""
    kind = next((n for n, c in _ERRORS.items() if isinstance(error, c)), "EngineError")
    text = str(error).strip() if isinstance(error, EngineError) else ""
    return json.dumps({"error": kind, "message": text or first_line(error)})


def read_error(line: str) -> EngineError | None:
    """The error that a line tells; None if it tells none."""
    try:
        answer = json.loads(line)
        kind, message = answer["error"], answer["message"]
    except (ValueError, KeyError, TypeError):
        return None
    return _ERRORS.get(kind, EngineError)(str(message))


def main() -> None:
    """Serve until the router says to end."""
    arguments = Arguments(**json.loads(sys.stdin.buffer.readline()))
    threading.Thread(target=_end_with_router, args=(Path(arguments.uds),), daemon=True).start()
    if arguments.cores:
        # Before PyTorch is imported, which counts the cores that it may use.
        os.sched_setaffinity(0, arguments.cores)
    try:
        code = _serve(arguments)
    except Exception as error:
        print(error_line(error), flush=True)
        if not isinstance(error, EngineError):
            raise
        code = 1
    sys.exit(code)


def _serve(arguments: Arguments) -> int:
    config = EngineConfig.from_mapping(arguments.config)
    settings = ServerSettings(
        uds=arguments.uds, limits=ServerLimits(**arguments.limits), drain_s=arguments.drain_s
    )
    from engine.server.run_server import run_server

    template = arguments.chat_template
    return run_server(
        config,
        settings,
        names=arguments.names,
        chat_template=None if template is None else Path(template),
        generation_defaults=arguments.generation_defaults,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )


def _end_with_router(uds: Path) -> None:
    # Read as bytes from below: the buffered reader's lock must not be held when the process ends.
    while os.read(0, 1024):
        pass
    with contextlib.suppress(OSError):
        uds.unlink()
    with contextlib.suppress(OSError):  # the last of them removes the folder
        uds.parent.rmdir()
    os._exit(0)


if __name__ == "__main__":
    main()
