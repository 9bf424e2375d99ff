"""Where a server is reached."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import EnvironmentLacks
from engine.server.settings import ServerSettings

_OPEN_FILES = 65536
_PROBE_S = 1.0  # one that is served takes a connection at once, unless it has too many


@contextmanager
def listening(settings: ServerSettings) -> Iterator[socket.socket | None]:
    """A socket bound to the address; None where uvicorn makes a Unix socket itself, which is
    removed in the end.

    Raises:
        EnvironmentLacks: the address cannot be used.
    """
    if settings.uds is not None:
        path = Path(settings.uds)
        try:
            _try_unix_socket(path)
        except OSError as error:
            raise _cannot_listen(f"unix:{path}", error, "another --uds") from error
        try:
            yield None
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
        return
    try:
        listener = _bound(settings.host, settings.port)
    except (OSError, UnicodeError) as error:  # the latter: no host can have that name
        where = f"{settings.host}:{settings.port}"
        choose = "another --port, or another --host of this machine"
        raise _cannot_listen(where, error, choose) from error
    with listener:
        yield listener


def _bound(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def _try_unix_socket(path: Path) -> None:
    """See to it that a socket can be made there; one that a dead server left is removed.

    uvicorn would take the place of one that is served, too.
    """
    if path.is_socket():
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(ConnectionRefusedError):
            probe.settimeout(_PROBE_S)
            probe.connect(str(path))
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        path.unlink()
    with socket.socket(socket.AF_UNIX) as probe:
        probe.bind(str(path))
    path.unlink()


def _cannot_listen(where: str, error: Exception, choose: str) -> EnvironmentLacks:
    why = getattr(error, "strerror", None) or error
    return EnvironmentLacks(f"cannot listen on {where}: {why}; choose {choose}")


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
