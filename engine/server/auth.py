"""API keys: a client must show one as `Authorization: Bearer KEY`."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from engine.server.errors import error_response

# What load balancers and Prometheus ask, as vLLM leaves it open; it tells nothing of requests.
OPEN_PATHS = frozenset({"/health", "/ping", "/version", "/load", "/metrics"})


class ApiKeys:
    """Lets requests through that show a known key; others are answered with 401.

    Keys are compared by their digests in constant time, and every key is compared, so that the
    time taken tells nothing about them. Keys are never logged.

    Args:
        app: what is guarded.
        keys: at least one.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._knows(scope):
            await self._app(scope, receive, send)
            return
        response = error_response(
            401,
            "a valid API key is needed: send the header Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
        await response(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        shown = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = shown[0].partition(b" ") if len(shown) == 1 else (b"", b"", b"")
        digest = _digest(key.strip())
        same = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(same) and scheme.lower() == b"bearer"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
