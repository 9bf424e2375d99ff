"""A server whose latencies are known: it computes nothing and answers after the times it is told.

What a load generator measures on it can be held against the truth, and two generators against each
other without an engine's own noise.

    python -m benchmarks.paced_server --model FOLDER --port 8000
"""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import Any

from aiohttp import web

from engine.tokenizer import Tokenizer, load_tokenizer

# Seconds until the first token, a prompt token and the fixed part; and between tokens.
FIRST_S = 0.03
PROMPT_TOKEN_S = 0.0005
GAP_S = 0.02
TOKENIZER = web.AppKey("tokenizer", Tokenizer)


async def complete(request: web.Request) -> web.StreamResponse:
    """POST /v1/completions, streamed: a token a chunk."""
    body = await request.json()
    prompt = body["prompt"]
    length = len(prompt if isinstance(prompt, list) else request.app[TOKENIZER].encode(prompt))
    loop = asyncio.get_running_loop()
    due = loop.time() + FIRST_S + PROMPT_TOKEN_S * length
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    response.enable_chunked_encoding()
    await response.prepare(request)
    total = body["max_tokens"]
    for number in range(1, total + 1):
        # Of the plan, not of the token before: what is late does not make the rest later.
        await asyncio.sleep(due - loop.time())
        due += GAP_S
        choice = {
            "index": 0,
            "text": " a",
            "finish_reason": "length" if number == total else None,
        }
        await response.write(_event({"choices": [choice]}))
    usage = {"prompt_tokens": length, "completion_tokens": total, "total_tokens": length + total}
    await response.write(_event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n")
    await response.write_eof()
    return response


def serve(model: str, port: int) -> None:
    """Serve the model of a folder on this machine until the process is ended."""

    async def list_models(_: web.Request) -> web.StreamResponse:
        entry = {"id": model, "object": "model", "root": model, "max_model_len": 2048}
        return web.json_response({"object": "list", "data": [entry]})

    async def health(_: web.Request) -> web.StreamResponse:
        return web.Response()

    app = web.Application()
    app[TOKENIZER] = load_tokenizer(model)
    app.router.add_get("/health", health)
    app.router.add_get("/v1/models", list_models)
    app.router.add_post("/v1/completions", complete)
    web.run_app(app, host="127.0.0.1", port=port, print=None)


def _event(content: Any) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    serve(arguments.model, arguments.port)
