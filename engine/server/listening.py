"""Where a server is reached."""

from __future__ import annotations

import contextlib
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from engine.errors import EnvironmentLacks
from engine.server.settings import ServerSettings

_OPEN_FILES = 65536


@contextmanager
def listening(settings: ServerSettings) -> Iterator[socket.socket | None]:
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


def address_of(settings: ServerSettings, listener: socket.socket | None) -> str:
    """What a client would call the address."""
    if listener is None:
        return f"unix:{settings.uds}"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{listener.getsockname()[1]}"


def allow_open_files() -> None:
    """Allow as many connections as the system lets us; often 1,024 are allowed at first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
