"""Small questions to a server: is it healthy, what does it serve, forget your prefixes."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any

# A server that compiles or loads may hold its event loop for some seconds.
PROBE_S = 5.0
_LARGEST = 1 << 20


def status_of(url: str, *, method: str = "GET", timeout_s: float = PROBE_S) -> int | None:
    """The HTTP status of the answer; None where nobody answers, or not in time."""
    answer = _ask(url, method, timeout_s)
    return None if answer is None else answer[0]


def models_of(url: str, *, timeout_s: float = PROBE_S) -> list[str] | None:
    """Names of the models that the server at `url` serves; None where it does not tell."""
    answer = _ask(f"{url}/v1/models", "GET", timeout_s)
    if answer is None or answer[0] != 200:
        return None
    try:
        content: Any = json.loads(answer[1])
        return [str(model["id"]) for model in content["data"]]
    except (ValueError, KeyError, TypeError):
        return None


def _ask(url: str, method: str, timeout_s: float) -> tuple[int, bytes] | None:
    # Only addresses of servers that were started here or given by the user come here.
    request = urllib.request.Request(url, method=method)  # noqa: S310
    # No proxy: what was started on this machine must be asked on this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout_s) as answer:
            return int(answer.status), answer.read(_LARGEST)
    except urllib.error.HTTPError as error:
        with error:
            return int(error.code), b""
    except (OSError, HTTPException, ValueError):
        return None
