"""Addresses that cannot be listened on are told in one sentence, and nobody's is taken away."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest
import uvicorn

from engine.errors import EnvironmentLacks
from engine.server.draining_server import DrainingServer
from engine.server.listening import listening
from engine.server.router import RouterApp
from engine.server.settings import ServerSettings


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "socket"


def test_a_unix_socket_that_is_served_is_left_alone(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as served:
        served.bind(str(path))
        served.listen()
        with (
            pytest.raises(EnvironmentLacks, match="Address already in use; choose another --uds"),
            listening(ServerSettings(uds=str(path))),
        ):
            raise AssertionError("it is in use")
        assert path.is_socket()


def test_a_unix_socket_of_a_dead_server_is_replaced_and_removed_in_the_end(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with listening(ServerSettings(uds=str(path))), socket.socket(socket.AF_UNIX) as ours:
        ours.bind(str(path))  # as uvicorn does
    assert not path.exists()


def test_unix_sockets_that_cannot_be_made(path: Path) -> None:
    path.write_text("precious")
    for where, why in (
        (path, "in use"),
        (path.parent / "no-folder" / "socket", "No such file"),
        (path.parent / ("x" * 200), "too long"),
    ):
        with (
            pytest.raises(EnvironmentLacks, match=f"cannot listen on unix:.*{why}"),
            listening(ServerSettings(uds=str(where))),
        ):
            raise AssertionError("it cannot be made")
    assert path.read_text() == "precious"


def test_a_host_that_can_be_no_name() -> None:
    with (
        pytest.raises(EnvironmentLacks, match="another --host"),
        listening(ServerSettings(host="x" * 100, port=0)),
    ):
        raise AssertionError("there is no such host")


def test_of_two_that_start_at_once_one_is_told() -> None:
    """An address can be bound to twice as long as nobody listens."""

    async def main(second: socket.socket) -> None:
        app = RouterApp([], "round_robin")
        server = DrainingServer(uvicorn.Config(app, lifespan="off"), app, drain_s=1)
        config = server.config
        config.load()
        server.lifespan = config.lifespan_class(config)
        await server.startup([second])

    with listening(ServerSettings(port=0)) as first:
        assert first is not None
        with listening(ServerSettings(port=first.getsockname()[1])) as second:
            assert second is not None
            first.listen()
            with pytest.raises(EnvironmentLacks, match=r"cannot listen: .*in use"):
                asyncio.run(main(second))
