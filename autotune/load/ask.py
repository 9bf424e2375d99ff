"""One question to a server, outside of a load."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from autotune.errors import Interrupted
from autotune.load.endpoint import http_message
from autotune.load.http_connection import Exchange, HttpClient
from autotune.load.loop_thread import CLOSE_S, finish, running_loop
from autotune.load.open_loop import POLL_S
from autotune.load.received import json_in


def ask(url: str, content: bytes, limit_s: float, stop: threading.Event | None = None) -> Exchange:
    """Send an HTTP request to the server at `url` and wait for the whole answer.

    Where there is none after `limit_s` seconds the exchange has an `error` that says so.

    Raises:
        Interrupted: `stop` was set.
    """
    exchange = Exchange(0, content)
    over: queue.SimpleQueue[Exchange] = queue.SimpleQueue()
    deadline = time.monotonic() + limit_s
    with running_loop() as (loop, _):
        client = HttpClient(url, clock=time.perf_counter, on_end=over.put)
        loop.call_soon_threadsafe(client.begin, exchange)
        try:
            while exchange.ended is None and time.monotonic() < deadline:
                if stop is not None and stop.is_set():
                    raise Interrupted("Interrupted before anything was measured.")
                with contextlib.suppress(queue.Empty):
                    over.get(timeout=POLL_S)
            late = exchange.ended is None
        finally:
            finish(client.close(), loop, CLOSE_S)
    if late:
        exchange.error = f"no answer within {limit_s:g} s"
    return exchange


def ask_json(
    url: str,
    path: str,
    *,
    api_key: str | None = None,
    body: Mapping[str, Any] | None = None,
    limit_s: float,
    stop: threading.Event | None = None,
) -> tuple[Exchange, Any]:
    """The answer to GET, or to POST of a body, and its JSON; None where that is no JSON.

    Raises:
        Interrupted: `stop` was set.
    """
    whole = f"{urlsplit(url).path}{path}"
    message = http_message(url, whole, api_key=api_key, body=body)
    exchange = ask(url, message, limit_s, stop)
    return exchange, json_in(content_of(exchange))


def content_of(exchange: Exchange) -> bytes:
    """The body of an answer."""
    return b"".join(piece for _, piece in exchange.pieces)
