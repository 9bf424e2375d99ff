"""A tiny model with tokenizer and chat template, served over HTTP or without a socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import uvicorn
from fastapi import FastAPI

from engine import EngineConfig
from engine.loading import LoadedModel, load_model
from engine.server.async_engine import AsyncEngine
from engine.server.errors import install_error_handlers
from engine.server.limits import ServerLimits
from engine.server.openapi import describe
from engine.server.responses import ChatCompletionChunk, CompletionChunk
from engine.server.routes import openai_routes
from engine.server.served_model import ServedModel
from engine.server.submits import Submits
from tests.engine.tiny_llama import make_tiny_llama
from tests.engine.tiny_tokenizers import byte_level

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n"
    "{% for call in m.tool_calls or [] %}{{ call.function.arguments.city }}\n{% endfor %}"
    "{% endfor %}{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
NAME = "tiny"
Result = TypeVar("Result")


def make_folder(folder: Path) -> Path:
    """A model folder with weights, tokenizer and chat template."""
    tokenizer = byte_level()
    make_tiny_llama(
        folder,
        seed=8,
        vocab_size=tokenizer.get_vocab_size(),
        eos_token_id=1,
        max_position_embeddings=512,
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE})
    )
    return folder


def load_tiny(folder: Path, **knobs: Any) -> tuple[LoadedModel, EngineConfig]:
    """The model of a folder, with a KV cache of some thousand tokens."""
    config = EngineConfig.from_mapping(
        {
            "model": str(folder),
            "kv_cache_memory_bytes": 4 << 20,
            "num_threads": 1,
            "max_num_seqs": 16,
            **knobs,
        }
    )
    return load_model(config), config


def make_app(model: ServedModel, engine: Submits) -> FastAPI:
    """The protocol's routes alone."""
    app = FastAPI(title="tiny", version="1")
    install_error_handlers(app)
    app.include_router(openai_routes(model, engine))
    describe(app, model)
    return app


class Served:
    """An app on an event loop of its own; requests go in without a socket."""

    def __init__(self, app: FastAPI, engine: AsyncEngine) -> None:
        self.app, self.engine = app, engine
        self.runner = asyncio.Runner()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Have the loop do something, and not for long."""
        return self.runner.run(asyncio.wait_for(work, 30))

    def client(self) -> httpx.AsyncClient:
        """A client of the app; what the app raises becomes a status, as on a socket."""
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://tiny")

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One request."""

        async def ask() -> httpx.Response:
            async with self.client() as client:
                return await client.request(method, path, **options)

        return self.run(ask())

    def post(self, path: str, **body: Any) -> httpx.Response:
        """One request with a JSON body."""
        return self.request("POST", path, json=body)

    def events(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The chunks of a stream, which must end as streams end."""
        answer = self.post(path, stream=True, **body)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        *chunks, done, rest = answer.text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        data = [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]
        form = ChatCompletionChunk if "chat" in path else CompletionChunk
        for chunk in data:
            form.model_validate(chunk, strict=True)
        return data

    def assert_idle(self) -> None:
        """No request, block or task is left."""
        deadline = time.monotonic() + 10
        while self.engine.engine.has_unfinished or self.engine.num_unfinished:
            assert time.monotonic() < deadline, "a request is left"
            self.run(asyncio.sleep(0.01))
        assert self.engine.engine.pool.num_used == 0

        async def others() -> list[asyncio.Task[Any]]:
            here = asyncio.current_task()
            return [task for task in asyncio.all_tasks() if task is not here]

        assert self.runner.run(others()) == []

    def close(self) -> None:
        """End the engine and the loop."""
        self.engine.close()
        self.runner.close()


@contextlib.contextmanager
def served_tiny(folder: Path, **knobs: Any) -> Iterator[Served]:
    """A tiny model, served without a socket."""
    loaded, config = load_tiny(folder, **knobs)
    model = ServedModel.of(loaded, config, names=[NAME])
    engine = AsyncEngine(loaded.engine(config), limits=ServerLimits())
    served = Served(make_app(model, engine), engine)
    try:
        yield served
    finally:
        served.close()


@contextlib.contextmanager
def over_http(app: FastAPI) -> Iterator[str]:
    """An app on a free loopback port, in a thread; yields its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline, "the server does not start"
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)
