"""GET /v1/models: what is served here."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from engine.server.answers import ASKS, documented
from engine.server.responses import ModelList, ModelObject
from engine.server.served_model import ServedModel


def models_route(model: ServedModel) -> APIRouter:
    """The routes on one model."""
    router = APIRouter()

    @router.get(
        "/v1/models",
        operation_id="listModels",
        summary="The models that are served",
        response_model=None,
        **documented(None, ModelList, errors=ASKS),
    )
    async def list_models() -> Response:
        data = [_described(name, model) for name in model.names]
        return JSONResponse({"object": "list", "data": data})

    @router.get(
        "/v1/models/{model}",
        operation_id="retrieveModel",
        summary="One of the models that are served",
        response_model=None,
        openapi_extra={
            "parameters": [
                {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
            ]
        },
        **documented(None, ModelObject, errors=ASKS),
    )
    async def retrieve_model(request: Request) -> Response:
        return _named(request.path_params["model"], model)

    # Names are often paths, which arrive with their slashes decoded.
    @router.get("/v1/models/{model:path}", include_in_schema=False, response_model=None)
    async def retrieve_model_of_path(request: Request) -> Response:
        return _named(request.path_params["model"], model)

    return router


def _named(name: str, model: ServedModel) -> Response:
    model.check_name(name)
    return JSONResponse(_described(name, model))


def _described(name: str, model: ServedModel) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "autotune",
        "root": model.root,
        "parent": None,
        "max_model_len": model.max_model_len,
    }
