"""Small questions to a server: is it healthy, what does it serve, forget your prefixes."""

from __future__ import annotations

from urllib.parse import urlsplit, urlunsplit

from autotune.load.ask import ask_json

# A server that compiles or loads may hold its event loop for some seconds.
PROBE_S = 5.0


def status_of(url: str, *, post: bool = False, api_key: str | None = None) -> int | None:
    """The HTTP status of the answer; None where nobody answers, or not in time."""
    parts = urlsplit(url)
    origin = urlunsplit((parts.scheme, parts.netloc, "", "", ""))
    exchange, _ = ask_json(
        origin, parts.path, api_key=api_key, body={} if post else None, limit_s=PROBE_S
    )
    return None if exchange.error else exchange.status


def models_of(url: str, api_key: str | None = None) -> tuple[int | None, list[str]]:
    """The status of the list of models, and the names in it; none where it is no such list."""
    exchange, found = ask_json(url, "/v1/models", api_key=api_key, limit_s=PROBE_S)
    try:
        return exchange.status, [str(model["id"]) for model in found["data"]]
    except (KeyError, TypeError):
        return exchange.status, []
