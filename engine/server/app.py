"""The server as an ASGI application: routes, limits and keys around one engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from engine.server.async_engine import AsyncEngine
from engine.server.auth import ApiKeys
from engine.server.body_limit import BodyLimit
from engine.server.errors import install_error_handlers
from engine.server.health import health_router, product_version
from engine.server.metrics_endpoint import metrics_router
from engine.server.openapi import describe
from engine.server.routes import openai_routes
from engine.server.served_model import ServedModel
from engine.server.settings import ServerSettings


def create_app(engine: AsyncEngine, model: ServedModel, settings: ServerSettings) -> FastAPI:
    """The application; its lifespan starts and closes the engine.

    Args:
        engine: generates.
        model: what requests and responses tell of the model.
        settings: keys and limits.
    """

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            engine.close()

    app = FastAPI(
        title="autotune",
        summary="OpenAI-compatible server of autotune's bundled engine",
        version=product_version(),
        lifespan=lifespan,
        # Its pages fetch scripts from elsewhere, which a server inside a network must not need.
        docs_url=None,
        redoc_url=None,
    )
    install_error_handlers(app)
    app.include_router(openai_routes(model, engine))
    app.include_router(health_router(engine))
    app.include_router(metrics_router(engine, model.name))
    describe(app, model, api_keys=bool(settings.api_keys))
    limits = settings.limits
    # The last that is added is the first to see a request: a stranger's body is not even read.
    app.add_middleware(BodyLimit, max_bytes=limits.max_body_bytes, timeout_s=limits.read_timeout_s)
    if settings.api_keys:
        app.add_middleware(ApiKeys, keys=settings.api_keys)
    return app
