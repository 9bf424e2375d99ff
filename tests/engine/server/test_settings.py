"""Settings and limits of a server: what is refused, and who can reach it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from engine.errors import ConfigError
from engine.server.limits import ServerLimits
from engine.server.settings import ServerSettings


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: ServerLimits(max_waiting=-1),
        lambda: ServerLimits(max_body_bytes=0),
        lambda: ServerLimits(stall_s=float("nan")),
        lambda: ServerSettings(port=70000),
        lambda: ServerSettings(drain_s=-1),
        lambda: ServerSettings(api_keys=("",)),
        lambda: ServerSettings(api_keys=("a b",)),
    ],
)
def test_bad_settings(wrong: Callable[[], object]) -> None:
    with pytest.raises(ConfigError):
        wrong()


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.0.4", False),
        ("example.org", False),
    ],
)
def test_who_can_reach_it(host: str, local: bool) -> None:
    assert ServerSettings(host=host).is_local is local
