"""The description of the API is whole, and tells what is known of the model."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from fastapi import FastAPI

from engine.server.openapi import describe
from engine.server.routes import openai_routes
from tests.engine.server.scripted_engine import ScriptedEngine
from tests.engine.server.test_served_model import model


@pytest.fixture
def description() -> dict[str, Any]:
    app = FastAPI()
    app.include_router(openai_routes(model(), ScriptedEngine([])))
    describe(app, model(), api_keys=True)
    assert app.openapi() is app.openapi()
    return dict(app.openapi())


def test_every_reference_leads_somewhere(description: dict[str, Any]) -> None:
    schemas = description["components"]["schemas"]
    named = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(description)))
    assert named == named & schemas.keys()
    assert {"CompletionRequest", "ChatCompletionChunk", "ErrorAnswer", "Tokens"} <= named
    assert "HTTPValidationError" not in named


def test_every_operation_is_described(description: dict[str, Any]) -> None:
    operations = [o for path in description["paths"].values() for o in path.values()]
    assert len(operations) == 6
    for operation in operations:
        assert operation["summary"]
        assert operation["security"] == [{"apiKey": []}]
        assert {"200", "401", "404", "500"} <= operation["responses"].keys()
        assert "422" not in operation["responses"]


def test_the_models_names_and_limits_are_told(description: dict[str, Any]) -> None:
    schemas = description["components"]["schemas"]
    for name in ("CompletionRequest", "ChatCompletionRequest", "TokenizeRequest"):
        assert schemas[name]["properties"]["model"]["anyOf"][0]["enum"] == ["a", "b"]
    fields = schemas["CompletionRequest"]["properties"]
    assert fields["max_tokens"]["anyOf"][0]["maximum"] == 99
    forms = fields["prompt"]["anyOf"]
    assert forms[2]["items"] == {"type": "integer", "minimum": 0, "exclusiveMaximum": 50}
    assert forms[3]["items"]["items"] == forms[2]["items"]
    assert fields["n"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 128}
