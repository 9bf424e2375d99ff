"""Errors as OpenAI's API writes them, and the status that each has."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match

from engine.errors import EngineError, RequestRefused
from engine.server.refusals import Draining, EngineFailed, Overloaded, TimedOut

_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
_RETRY_DRAINING_S = 1.0  # another replica, or the next server on this port, may take it
_SHOWN = 120  # characters of a bad value in a message

_log = logging.getLogger(__name__)


class ApiError(Exception):
    """An answer other than the one asked for.

    Args:
        status: the HTTP status.
        message: one sentence for a person: what is wrong, where, and what would be right.
        param: the field of the request that is at fault.
        code: the same for a program.
        retry_after_s: when the client may come again, seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        """The error object of OpenAI's API."""
        kind = _KINDS.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        """The whole answer; `headers` join those that belong to the error."""
        own = {}
        if self.retry_after_s is not None:  # whole seconds, by RFC 9110
            own["retry-after"] = str(max(math.ceil(self.retry_after_s), 1))
        return Response(
            json.dumps(self.body),
            self.status,
            {**(headers or {}), **own},
            media_type="application/json",
        )


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    retry_after_s: float | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An answer with an error in OpenAI's form; see `ApiError`."""
    error = ApiError(status, message, param=param, code=code, retry_after_s=retry_after_s)
    return error.response(headers)


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an error; one that was not foreseen is logged, not told."""
    match error:
        case ApiError():
            return error
        case Overloaded():
            return ApiError(
                429, str(error), code="server_overloaded", retry_after_s=error.retry_after_s
            )
        case Draining():
            return ApiError(
                503, str(error), code="server_draining", retry_after_s=_RETRY_DRAINING_S
            )
        case EngineFailed():
            return ApiError(503, str(error), code="engine_failed")
        case TimedOut():
            return ApiError(504, str(error), code="request_timeout")
        case RequestRefused():
            return ApiError(400, str(error), code="request_refused")
        case EngineError():
            return ApiError(400, str(error), code="invalid_value")
    _log.error("a request met an error that was not foreseen", exc_info=error)
    return ApiError(500, f"the server met an unforeseen {type(error).__name__}", code="internal")


def invalid_body(error: ValidationError, sentences: Mapping[str, str]) -> ApiError:
    """What is wrong with a request's body.

    `sentences` says of single fields why they are refused, where pydantic's words do not help.
    """
    errors = error.errors(include_url=False, include_context=False)
    # Of a union every member complains; the one that the client meant got furthest.
    worst = max(errors, key=_depth)
    path = _path(worst)
    param = ".".join(map(str, path)) or None
    if worst["type"] == "json_invalid":
        why = worst["msg"].removeprefix("Invalid JSON: ")
        return ApiError(400, f"the body is not valid JSON: {why}", code="invalid_json")
    sentence = sentences.get(str(path[0])) if path else None
    if sentence is not None:
        return ApiError(400, sentence, param=param, code="unsupported_parameter")
    message = worst["msg"].removeprefix("Value error, ")
    if worst["type"] == "missing":
        return ApiError(400, f"{param} is missing", param=param, code="missing_parameter")
    if worst["type"].endswith("_type"):  # any of the union's types would be right
        alike = (e["msg"] for e in errors if e["type"].endswith("_type") and _path(e) == path)
        message = " or ".join(dict.fromkeys(alike)).replace(" or Input should be", " or")
    if not worst["type"].startswith("value_error"):
        message = f"{message}, got {_shown(worst['input'])}"
    where = f"{param}: " if param else "the body: "
    return ApiError(400, where + message, param=param, code="invalid_value")


def _depth(error: Any) -> tuple[int, bool]:
    return len(error["loc"]), error["type"] not in ("string_type", "missing")


def _path(error: Any) -> list[int | str]:
    """Where in the body a fault is."""
    return [part for part in error["loc"] if _named(part)]


def _named(part: int | str) -> bool:
    """Whether a part of a location is the client's, not a member of a union.

    Fields are in lower case, classes are not.
    """
    if isinstance(part, int):
        return True
    return part.isidentifier() and part.islower() and part not in _TYPES


_TYPES = {"str", "int", "float", "bool"}


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def install_error_handlers(app: FastAPI) -> None:
    """Have every error of an app answered in OpenAI's form."""

    async def known(_request: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        headers = {name.lower(): value for name, value in (error.headers or {}).items()}
        if error.status_code == 405:
            headers["allow"] = ", ".join(_methods(request))
        return _of_http(error, headers)

    app.add_exception_handler(ApiError, known)
    app.add_exception_handler(EngineError, known)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, known)


def _methods(request: Request) -> list[str]:
    """The methods that a path takes; the router names those of its first route alone."""

    def takes(method: str) -> bool:
        scope = {**request.scope, "method": method}
        return any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)

    return [method for method in _METHODS if takes(method)]


def _of_http(error: HTTPException, headers: Mapping[str, str]) -> Response:
    status, message, code = error.status_code, error.detail, None
    if message == HTTPStatus(status).phrase:  # the router's own; say more
        code = message.lower().replace(" ", "_")
        message = {
            404: "there is no such path here; /openapi.json lists those there are",
            405: "this path takes other methods, which the header Allow names",
        }.get(status, message)
    return error_response(status, message, code=code, headers=headers)
