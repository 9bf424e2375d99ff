"""Reading a request's body: JSON of the right shape, or a sentence on what is wrong with it."""

from __future__ import annotations

from typing import TypeVar

from fastapi import Request
from pydantic import TypeAdapter, ValidationError

from engine.server.errors import ApiError, invalid_body
from engine.server.request_fields import REFUSED

Body = TypeVar("Body")


async def read_body(request: Request, form: TypeAdapter[Body]) -> Body:
    """The body of a request.

    Raises:
        ApiError: 415, it is not said to be JSON; 400, it is no JSON or not what is wanted.
    """
    media = request.headers.get("content-type", "application/json").partition(";")[0].strip()
    if media.lower() != "application/json" and not media.lower().endswith("+json"):
        raise ApiError(
            415,
            f"the body's type is {media!r}: send JSON with Content-Type: application/json",
            code="unsupported_media_type",
        )
    content = await request.body()
    try:
        return form.validate_json(content)
    except ValidationError as error:
        raise invalid_body(error, REFUSED) from error
