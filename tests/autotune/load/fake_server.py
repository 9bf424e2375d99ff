"""A server that speaks OpenAI's protocol, on a thread of its own, and misbehaves as it is told."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

Behaviour = Callable[["FakeServer", web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


@dataclass
class FakeServer:
    """What it does; `asked` are the bodies of the requests that came, `left` counts disconnects.

    `extensions` are the fields beyond OpenAI's that it takes (others are refused with 400);
    `counts` what its chunks tell: token_ids, continuous_usage, usage, or nothing. `tokens` is what
    /tokenize tells, whatever it is asked.
    """

    model: str = "fake"
    key: str | None = None
    max_model_len: int | None = 512
    vocab_size: int = 1000
    gap_s: float = 0.001
    tokens_per_chunk: int = 1
    refused_fields: frozenset[str] = frozenset()
    counts: frozenset[str] = frozenset(("token_ids", "continuous_usage", "usage"))
    behaviour: Behaviour | None = None
    models: Any = None
    tokenizes: bool = True
    tokens: list[Any] | None = None
    metrics: Callable[[FakeServer], str] | None = None
    cached_tokens: int = 0
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    left: int = 0
    url: str = ""

    async def list_models(self, request: web.Request) -> web.StreamResponse:
        """GET /v1/models."""
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            return self.error(401, "no valid key")
        if self.models is not None:
            if isinstance(self.models, str):
                return web.Response(text=self.models)
            return web.json_response(self.models)
        entry = {"id": self.model, "object": "model", "max_model_len": self.max_model_len}
        return web.json_response({"object": "list", "data": [entry]})

    async def tokenize(self, request: web.Request) -> web.StreamResponse:
        """POST /tokenize as vLLM has it: a token a word."""
        if not self.tokenizes:
            raise web.HTTPNotFound
        if self.tokens is not None:
            return web.json_response({"tokens": self.tokens})
        words = (await request.json())["prompt"].split()
        tokens = [3 + sum(map(ord, word)) % (self.vocab_size - 3) for word in words]
        return web.json_response({"tokens": tokens, "count": len(tokens), "max_model_len": 512})

    async def show_metrics(self, request: web.Request) -> web.StreamResponse:
        """GET /metrics."""
        if self.metrics is None:
            raise web.HTTPNotFound
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            return self.error(401, "no valid key")
        return web.Response(text=self.metrics(self))

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions and /v1/chat/completions."""
        body = await request.json()
        self.asked.append(body)
        self.headers.append(dict(request.headers))
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            return self.error(401, "no valid key")
        for name in self.refused_fields:
            if name in body or name in body.get("stream_options", {}):
                return self.error(400, f"unknown field {name}")
        if isinstance(body.get("prompt"), list) and max(body["prompt"]) >= self.vocab_size:
            return self.error(400, "token id out of vocabulary")
        try:
            if self.behaviour is not None:
                return await self.behaviour(self, request, body)
            return await self.stream(request, body)
        except (asyncio.CancelledError, ConnectionError):
            self.left += 1
            raise

    async def stream(
        self, request: web.Request, body: dict[str, Any], most: int | None = None
    ) -> web.StreamResponse:
        """The whole answer, or its first `most` tokens."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        total, sent = body["max_tokens"], 0
        while sent < total and (most is None or sent < most):
            await asyncio.sleep(self.gap_s)
            number = min(self.tokens_per_chunk, total - sent)
            sent += number
            await response.write(self.chunk(body, number, sent, last=sent == total))
        if most is None:
            if "usage" in self.counts and body.get("stream_options", {}).get("include_usage"):
                usage = {"choices": [], "usage": self.usage(body, sent)}
                await response.write(sse(usage))
            await response.write(b"data: [DONE]\n\n")
            await response.write_eof()
        return response

    def chunk(self, body: dict[str, Any], number: int, sent: int, *, last: bool = False) -> bytes:
        """One event with `number` tokens, `sent` with those before."""
        text = " word" * number
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length" if last else None}
        choice |= {"delta": {"content": text}} if "messages" in body else {"text": text}
        if body.get("return_token_ids") and "token_ids" in self.counts:
            choice["token_ids"] = list(range(sent - number, sent))
        event: dict[str, Any] = {"choices": [choice]}
        options = body.get("stream_options", {})
        if options.get("continuous_usage_stats") and "continuous_usage" in self.counts:
            event["usage"] = self.usage(body, sent)
        return sse(event)

    def usage(self, body: dict[str, Any], sent: int) -> dict[str, Any]:
        """A usage object."""
        prompt = body.get("prompt") or body["messages"][0]["content"]
        length = len(prompt) if isinstance(prompt, list) else len(prompt.split())
        return {
            "prompt_tokens": length,
            "completion_tokens": sent,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def error(self, status: int, message: str, **headers: str) -> web.Response:
        """An error as OpenAI writes them."""
        return web.json_response(
            {"error": {"message": message, "type": "invalid_request_error"}},
            status=status,
            headers=headers,
        )


def sse(event: Any) -> bytes:
    """One event of a stream."""
    return b"data: " + json.dumps(event).encode() + b"\n\n"


@contextmanager
def serving(server: FakeServer) -> Iterator[FakeServer]:
    """Let it listen on a free port; closed afterwards with all of its connections."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> web.AppRunner:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_get("/v1/models", server.list_models)
        app.router.add_get("/metrics", server.show_metrics)
        app.router.add_post("/tokenize", server.tokenize)
        app.router.add_post("/v1/completions", server.complete)
        app.router.add_post("/v1/chat/completions", server.complete)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner

    async def end() -> None:
        await runner.cleanup()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.sleep(0.01)  # transports close in the loop's next round

    runner = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    try:
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(end(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
