"""The id that an answer has."""

from __future__ import annotations

import secrets

from fastapi import Request

_LONGEST = 128


def request_id(request: Request, prefix: str) -> str:
    """An id of the kind that `prefix` names; a client's `X-Request-Id` is part of it, as in vLLM,
    so that its log and the answer can be matched."""
    given = request.headers.get("x-request-id", "")
    own = given if 0 < len(given) <= _LONGEST else secrets.token_hex(16)
    return f"{prefix}-{own}"
