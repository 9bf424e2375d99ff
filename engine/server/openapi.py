"""The API's description, with what is known only of the model that is served."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from engine.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeRequest,
)
from engine.server.responses import ChatCompletionChunk, CompletionChunk
from engine.server.served_model import ServedModel

_BODIES: tuple[type[BaseModel], ...] = (
    CompletionRequest,
    ChatCompletionRequest,
    TokenizeRequest,
    TokenizeChatRequest,
    DetokenizeRequest,
)
_CHUNKS: tuple[type[BaseModel], ...] = (CompletionChunk, ChatCompletionChunk)
_SCHEMA = "#/components/schemas/{model}"


def describe(app: FastAPI, model: ServedModel, *, api_keys: bool = False) -> None:
    """Have the app describe itself with the bodies that its routes read by hand.

    Args:
        app: has its routes already.
        model: whose names and limits the description tells.
        api_keys: whether a key is asked for.
    """
    made: dict[str, Any] = {}
    generic = app.openapi

    def openapi() -> dict[str, Any]:
        if not made:
            made.update(generic())
            _add_bodies(made, model)
            _link(made)
            if api_keys:
                _ask_for_keys(made)
        return made

    app.openapi = openapi  # type: ignore[method-assign]


def _add_bodies(description: dict[str, Any], model: ServedModel) -> None:
    _, bodies = models_json_schema(
        [(read, "validation") for read in (*_BODIES, *_CHUNKS)], ref_template=_SCHEMA
    )
    schemas = description.setdefault("components", {}).setdefault("schemas", {})
    schemas.update(bodies["$defs"])
    names = list(model.names)
    for body in _BODIES:
        fields = schemas[body.__name__]["properties"]
        fields["model"] = {
            "anyOf": [{"type": "string", "enum": names}, {"type": "null"}],
            "description": "The served model's name; none means that one.",
        }
        for name in ("max_tokens", "max_completion_tokens"):
            if name in fields:
                _lower(fields[name], "maximum", model.max_model_len - 1)
        for name in ("prompt", "tokens", "stop_token_ids"):
            if name in fields:
                _lower(fields[name], "exclusiveMaximum", model.vocab_size)


def _lower(schema: Any, bound: str, value: int) -> None:
    """Set a bound of every integer in a schema."""
    if isinstance(schema, list):
        for item in schema:
            _lower(item, bound, value)
    elif isinstance(schema, dict):
        if schema.get("type") == "integer":
            schema.pop("exclusiveMaximum", None)
            schema[bound] = value
        for item in list(schema.values()):
            _lower(item, bound, value)


def _link(description: dict[str, Any]) -> None:
    """Say which answers hold what other requests need."""
    paths = description["paths"]
    links = {
        ("/v1/models", "get"): {
            "retrieveModel": {
                "operationId": "retrieveModel",
                "parameters": {"model": "$response.body#/data/0/id"},
            }
        },
        ("/tokenize", "post"): {
            "detokenize": {
                "operationId": "detokenize",
                "requestBody": {"tokens": "$response.body#/tokens"},
            },
        },
        ("/detokenize", "post"): {
            "tokenize": {
                "operationId": "tokenize",
                "requestBody": {"prompt": "$response.body#/prompt"},
            },
        },
    }
    for (path, method), link in links.items():
        if path in paths:
            paths[path][method]["responses"]["200"]["links"] = link


def _ask_for_keys(description: dict[str, Any]) -> None:
    schemes = description["components"].setdefault("securitySchemes", {})
    schemes["apiKey"] = {"type": "http", "scheme": "bearer"}
    for path, operations in description["paths"].items():
        if path.startswith("/v1/") or path in ("/tokenize", "/detokenize"):
            for operation in operations.values():
                operation["security"] = [{"apiKey": []}]
