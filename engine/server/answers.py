"""How a route's body and answers are described."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from engine.server.responses import ErrorAnswer

_ERRORS = {
    400: "The request is not one that can be served; the message says why.",
    401: "The API key is missing or wrong.",
    404: "No such model.",
    408: "The body took too long to come.",
    413: "The body is too large.",
    415: "The body is not said to be JSON.",
    429: "Too many requests wait already; Retry-After says when to come again.",
    500: "A fault of the server.",
    503: "The server is ending, or its engine broke down.",
    504: "The request took longer than the server allows.",
}
READS = (400, 401, 404, 408, 413, 415, 500, 503)
GENERATES = (*READS, 429, 504)
ASKS = (401, 404, 500, 503)


def documented(
    body: type[BaseModel] | tuple[type[BaseModel], ...] | None,
    answer: type[BaseModel],
    *,
    errors: tuple[int, ...],
    chunk: type[BaseModel] | None = None,
) -> dict[str, Any]:
    """Arguments of a route: what it takes and answers.

    `chunk` is what the events of a stream hold, where the answer may be one. Bodies are read by
    `engine.server.body.read_body`; `engine.server.openapi.describe` puts all these schemas where
    the references point.
    """
    said: dict[str, Any] = {}
    if body is not None:
        forms = body if isinstance(body, tuple) else (body,)
        references = [{"$ref": f"#/components/schemas/{form.__name__}"} for form in forms]
        schema = references[0] if len(references) == 1 else {"anyOf": references}
        said["openapi_extra"] = {
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}
        }
    good: dict[str, Any] = {"model": answer, "description": "Done."}
    if chunk is not None:
        good["content"] = {"text/event-stream": {"schema": _event(chunk)}}
    responses: dict[int | str, Any] = {200: good}
    for status in sorted(errors):
        responses[status] = {"model": ErrorAnswer, "description": _ERRORS[status]}
        if status in (429, 503):
            responses[status]["headers"] = {
                "Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}
            }
    said["responses"] = responses
    return said


def _event(chunk: type[BaseModel]) -> dict[str, Any]:
    """The schema of a server-sent event."""
    data = {
        "description": f"With stream set: each event has a {chunk.__name__}, the last one [DONE].",
        "anyOf": [
            {"const": "[DONE]"},
            {
                "type": "string",
                "contentMediaType": "application/json",
                "contentSchema": {"$ref": f"#/components/schemas/{chunk.__name__}"},
            },
        ],
    }
    return {"type": "object", "properties": {"data": data}, "required": ["data"]}
