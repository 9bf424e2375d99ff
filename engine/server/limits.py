"""What the server allows one request, one client and the queue."""

from __future__ import annotations

from dataclasses import dataclass, fields

from engine.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """Limits of a server; None sets no limit of its own.

    Args:
        max_waiting: requests that may wait beyond those that have a seat in the running batch.
        max_prompt_tokens: longest prompt.
        max_output_tokens: longest output; also what a request gets that asks for no length.
        max_body_bytes: longest body of an HTTP request.
        max_header_bytes: most bytes of an HTTP request's line and headers.
        request_timeout_s: seconds that a request may take, waiting included.
        read_timeout_s: seconds in which a client must have sent its headers, and then its body.
        write_timeout_s: seconds that a client may go without reading while data wait for it.
        keep_alive_s: seconds that a connection may stay without a request.
        stall_s: seconds without progress, while there is work, after which the server says that
            it is not healthy.

    Raises:
        ConfigError: a limit is not above 0.
    """

    max_waiting: int = 1024
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None
    max_body_bytes: int = 16 << 20
    max_header_bytes: int = 64 << 10
    request_timeout_s: float | None = 600.0
    read_timeout_s: float = 30.0
    write_timeout_s: float = 60.0
    keep_alive_s: float = 75.0
    stall_s: float = 60.0

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            least = 0 if limit.name == "max_waiting" else None
            # Written so that NaN, which compares false with everything, is refused too.
            if value is not None and not (value > 0 or value == least):
                raise ConfigError(f"{limit.name}={value!r} must be above 0")
