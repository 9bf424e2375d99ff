"""How a server is reached, by whom, and what it allows."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from engine.errors import ConfigError
from engine.server.limits import ServerLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Settings of a server beside the engine's own.

    Args:
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        uds: path of a Unix socket to listen on instead.
        api_keys: keys of which a client must show one; none asks for none.
        access_log: log each request's line and status.
        limits: what is allowed.
        drain_s: seconds that running requests are given when the server is asked to end.

    Raises:
        ConfigError: a port out of range, an empty key, a negative time.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    # Not shown where settings are: logs and tracebacks.
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    access_log: bool = False
    limits: ServerLimits = field(default_factory=ServerLimits)
    drain_s: float = 30.0

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port={self.port} must lie in [0, 65535]")
        if not self.drain_s >= 0:
            raise ConfigError(f"drain_s={self.drain_s!r} must be at least 0 seconds")
        for key in self.api_keys:
            if not key or not key.isascii() or any(c.isspace() for c in key):
                raise ConfigError("an API key must be printable ASCII without spaces, not empty")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        if self.uds is not None or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name, which may mean anything
            return False
