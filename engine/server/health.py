"""Whether the server is fit to get requests, and how much it has to do."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from engine.server.async_engine import AsyncEngine


class Health(BaseModel):
    """Whether requests are served, and if not, why."""

    status: str
    detail: str | None = None


class Version(BaseModel):
    """The release that serves."""

    version: str


class Load(BaseModel):
    """How many requests are in the engine."""

    server_load: int


def health(engine: AsyncEngine) -> tuple[int, Health]:
    """The status code and what `/health` says.

    503 while the engine makes no progress with the work it has, once it broke down, and while the
    server drains, so that a load balancer takes it out.
    """
    if engine.failed is not None:
        return 503, Health(status="failed", detail=str(engine.failed))
    if engine.draining:
        return 503, Health(status="draining", detail="the server is ending")
    stalled = engine.stalled_for()
    if stalled > engine.limits.stall_s:
        detail = f"no step has ended for {stalled:.0f} s, and {engine.num_unfinished} requests wait"
        return 503, Health(status="stalled", detail=detail)
    return 200, Health(status="ok")


def product_version() -> str:
    """The installed release."""
    try:
        return version("inference-autotune")
    except PackageNotFoundError:  # run from a folder that was never installed
        return "unknown"


def health_router(engine: AsyncEngine) -> APIRouter:
    """`/health`, `/ping`, `/version` and `/load`, as vLLM has them."""
    router = APIRouter(tags=["server"])
    unfit = {503: {"model": Health, "description": "The server is not fit to get requests."}}

    async def tell_health() -> Response:
        """Whether the server is fit to get requests."""
        status, said = health(engine)
        return JSONResponse(said.model_dump(exclude_none=True), status)

    for path, methods in (("/health", ["GET"]), ("/ping", ["GET", "POST"])):
        for method in methods:
            router.add_api_route(
                path,
                tell_health,
                methods=[method],
                response_model=Health,
                responses=unfit,  # type: ignore[arg-type]
                operation_id=f"{path[1:]}_{method.lower()}",
            )

    @router.get("/version")
    async def tell_version() -> Version:
        """The release that serves."""
        return Version(version=product_version())

    @router.get("/load")
    async def tell_load() -> Load:
        """How many requests are in the engine."""
        return Load(server_load=engine.num_unfinished)

    return router
