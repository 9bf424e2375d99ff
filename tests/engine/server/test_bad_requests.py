"""Requests that cannot be served get the right status and one sentence, and the server goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from pydantic import BaseModel, ValidationError
from starlette.testclient import TestClient

from engine.server.errors import install_error_handlers
from engine.server.protocol import ChatCompletionRequest, DetokenizeRequest
from tests.engine.server.tiny_served import Served

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "a"}]


@pytest.fixture(autouse=True)
def _leaves_nothing(tiny: Served) -> Iterator[None]:
    yield
    tiny.assert_idle()


def refusal(answer: Any, status: int = 400) -> dict[str, Any]:
    """The error object of an answer, which must be one."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    return dict(error)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b'{"prompt": "a",}', "JSON"),
        (b'{"prompt": "\xff"}', "JSON"),
        (b"\xff\xfe{}", "JSON"),
        (b'{"prompt": "\\ud800"}', "JSON"),
        (b"[" * 100_000, "JSON"),
        (b'{"prompt": [' + b"9" * 5000 + b"]}", "JSON"),
        (b"[]", "object"),
        (b'"a"', "object"),
        (b"null", "object"),
        (b"{}", "prompt is missing"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_bodies_that_are_no_request(tiny: Served, content: bytes, said: str) -> None:
    headers = {"content-type": "application/json"}
    for path in (COMPLETIONS, CHATS, "/tokenize", "/detokenize"):
        answer = tiny.request("POST", path, content=content, headers=headers)
        message = refusal(answer)["message"]
        if path == COMPLETIONS:
            assert message.count(said) == 1


def test_bodies_that_are_not_json(tiny: Served) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        answer = tiny.request(
            "POST", COMPLETIONS, content=b'{"prompt":"a"}', headers={"content-type": kind}
        )
        assert "Content-Type: application/json" in refusal(answer, 415)["message"]
    body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
    for kind in ("application/json; charset=utf-8", "application/vnd.api+json"):
        answer = tiny.request("POST", COMPLETIONS, content=body, headers={"content-type": kind})
        assert answer.status_code == 200
    assert tiny.request("POST", COMPLETIONS, content=body).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"prompt": 5}, "prompt", "a text, a list of texts"),
        ({"prompt": []}, "prompt", "empty list"),
        ({"prompt": [[]]}, "prompt", "empty list of token ids"),
        ({"prompt": ["a", 1]}, "prompt", "a list of texts"),
        ({"prompt": [1, "a"]}, "prompt", "a list of texts"),
        ({"prompt": [True]}, "prompt", "a list of texts"),
        ({"prompt": [-1]}, "prompt", "negative"),
        ({"prompt": [10**20]}, "prompt", "above 2147483647"),
        ({"prompt": [[1], [2.5]]}, "prompt", "a list of texts"),
        ({"prompt": None}, "prompt", "a list of texts"),
        ({"prompt": ["a"] * 2049}, "prompt", "2048"),
        ({"temperature": "hot"}, "temperature", 'number, got "hot"'),
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"temperature": True}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_k": 1.5}, "top_k", "integer"),
        ({"top_k": 2**40}, "top_k", "less than"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 10**9}, "n", "128"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"max_tokens": 0}, "max_tokens", "echo"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop": "a" * 257}, "stop", "at most 256"),
        ({"stop": [5]}, "stop.0", "string"),
        ({"stop": 5}, "stop", "a valid string or a valid array, got 5"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids", "below 355"),
        ({"logprobs": 21}, "logprobs", "20"),
        ({"logprobs": True}, "logprobs", "integer"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "boolean"),
        ({"min_tokens": 20}, "min_tokens", "above max_tokens"),
        ({"echo": True, "logprobs": 1}, "echo", "not served"),
        ({"best_of": 2}, "best_of", "ask for n"),
        ({"suffix": "b"}, "suffix", "not served"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not served"),
        ({"use_beam_search": True}, "use_beam_search", "temperature"),
        ({"response_format": {"type": "json_object"}}, "response_format.type", "grammar"),
        ({"guided_json": {}}, "guided_json", "grammar"),
        ({"include_stop_str_in_output": True}, "include_stop_str_in_output", "before"),
        ({"skip_special_tokens": False}, "skip_special_tokens", "return_token_ids"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None,
)
def test_fields_that_cannot_be_served(
    tiny: Served, fields: dict[str, Any], param: str, said: str
) -> None:
    for stream in (False, True):
        error = refusal(tiny.post(COMPLETIONS, **{"prompt": "a", "stream": stream, **fields}))
        assert error["param"] == param
        assert said in error["message"]


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({}, "prompt", "prompt is missing"),
        ({"prompt": 5}, "prompt", "string, got 5"),
        ({"prompt": "a", "model": 5}, "model", "string, got 5"),
        ({"messages": "a"}, "messages", "array"),
        ({"messages": [{"role": 5}]}, "messages.0.role", "string, got 5"),
        ({"messages": HELLO, "chat_template": "a"}, "chat_template", "not taken from requests"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None,
)
def test_what_cannot_be_tokenized(
    tiny: Served, fields: dict[str, Any], param: str, said: str
) -> None:
    """Two forms are taken; of the one that was not meant nothing is told."""
    error = refusal(tiny.post("/tokenize", **fields))
    assert error["param"] == param
    assert said in error["message"]


@pytest.mark.parametrize(
    ("form", "fields"),
    [
        (DetokenizeRequest, {"tokens": ["a"] * 1000}),
        (ChatCompletionRequest, {"messages": [1] * 1000}),
        (ChatCompletionRequest, {"messages": [{"role": "user", "content": [1] * 1000}]}),
        (ChatCompletionRequest, {"messages": [{"role": "user", "tool_calls": [1] * 1000}]}),
        (ChatCompletionRequest, {"messages": HELLO, "tools": [1] * 1000}),
        (ChatCompletionRequest, {"messages": HELLO, "documents": [1] * 1000}),
        (ChatCompletionRequest, {"messages": HELLO, "modalities": [1] * 1000}),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else value.__name__,
)
def test_of_a_thousand_faults_few_are_looked_for(
    form: type[BaseModel], fields: dict[str, Any]
) -> None:
    """Each fault takes a kilobyte, and a body has room for millions."""
    with pytest.raises(ValidationError) as found:
        form.model_validate_json(json.dumps(fields))
    assert found.value.error_count() <= 2


def test_numbers_that_json_has_not(tiny: Served) -> None:
    headers = {"content-type": "application/json"}
    for number in (b"NaN", b"Infinity", b"1e999"):
        content = b'{"prompt": "a", "top_p": ' + number + b"}"
        answer = tiny.request("POST", COMPLETIONS, content=content, headers=headers)
        assert "top_p" in refusal(answer)["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"best_of": 1, "suffix": None, "logit_bias": {}, "use_beam_search": False},
        {"response_format": {"type": "text"}, "prompt_logprobs": None, "bad_words": []},
        {"user": "me", "store": True, "metadata": {"a": 1}, "stream_options": None},
        {"n": 1.0, "max_tokens": 2.0, "temperature": 1, "top_k": -1, "min_p": 0},
        {"skip_special_tokens": True, "include_stop_str_in_output": False, "stop": []},
        dict.fromkeys(("n", "temperature", "top_p", "seed", "stop", "stream", "echo", "model")),
    ],
)
def test_fields_that_mean_nothing_are_accepted(tiny: Served, fields: dict[str, Any]) -> None:
    answer = tiny.post(COMPLETIONS, **{"prompt": "a", "max_tokens": 2, **fields})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "a"}, "messages", "array"),
        (
            {"messages": [{"role": "user", "content": 5}]},
            "messages.0.content",
            "Input should be a valid string or a valid array, got 5",
        ),
        ({"messages": [{"content": "a"}]}, "messages.0.role", "missing"),
        ({"messages": [{"role": "", "content": "a"}]}, "messages.0.role", "1 character"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content.0.type",
            "image_url",
        ),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs to true"),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "missing"),
        ({"tool_choice": "required"}, "tool_choice", "forced"),
        ({"tool_choice": {"type": "function"}}, "tool_choice", "forced"),
        ({"chat_template": "{{ 1 }}"}, "chat_template", "not taken from requests"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "messages"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "1"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "add_generation_prompt",
            "contradict",
        ),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None,
)
def test_chats_that_cannot_be_served(
    tiny: Served, fields: dict[str, Any], param: str, said: str
) -> None:
    error = refusal(tiny.post(CHATS, **{"messages": HELLO, **fields}))
    assert error["param"] == param
    assert said in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_too_long(tiny: Served, stream: bool) -> None:
    limit = tiny.engine.engine.max_model_len
    for fields, said in (
        ({"prompt": [3] * limit, "max_tokens": 1}, f"{limit} tokens"),
        ({"prompt": [3] * (limit - 1), "max_tokens": 2}, "max_tokens=2"),
        ({"prompt": "a", "max_tokens": 10**6}, "lower max_tokens"),
        ({"prompt": "quick " * 5000, "max_tokens": 1}, "shorten the prompt"),
    ):
        error = refusal(tiny.post(COMPLETIONS, stream=stream, **fields))
        assert error["code"] == "context_length_exceeded"
        assert said in error["message"]
    assert tiny.post(COMPLETIONS, prompt=[3] * (limit - 1), max_tokens=1).status_code == 200


def test_prompts_without_tokens_or_outside_the_vocabulary(tiny: Served) -> None:
    assert refusal(tiny.post(COMPLETIONS, prompt=""))["code"] == "empty_prompt"
    for path, field in ((COMPLETIONS, "prompt"), ("/detokenize", "tokens")):
        error = refusal(tiny.post(path, **{field: [5, 10**6]}))
        assert "token id 1000000 is not in the vocabulary" in error["message"]


def test_more_outputs_at_once_than_the_server_has_room_for(tiny: Served) -> None:
    error = refusal(tiny.post(COMPLETIONS, prompt=["a"] * 100, n=128))
    assert "12800 sequences" in error["message"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHATS, "/tokenize", "/detokenize"])
def test_other_models_are_not_found(tiny: Served, path: str) -> None:
    body = {"model": "gpt-4", "prompt": "a", "messages": HELLO, "tokens": [1]}
    if path == "/tokenize":
        del body["messages"]
    error = refusal(tiny.post(path, **body), 404)
    assert error["code"] == "model_not_found"
    assert "'gpt-4'" in error["message"]
    assert "'tiny'" in error["message"]


def test_other_paths_and_methods(tiny: Served) -> None:
    assert refusal(tiny.request("GET", "/v2/completions"), 404)["code"] == "not_found"
    answer = tiny.request("GET", COMPLETIONS)
    assert refusal(answer, 405)["code"] == "method_not_allowed"
    assert answer.headers["allow"] == "POST"


def test_a_long_bad_value_is_not_repeated_whole(tiny: Served) -> None:
    error = refusal(tiny.post(COMPLETIONS, prompt="a", model=["x" * 10_000]))
    assert len(error["message"]) < 300


def test_all_methods_of_a_path_are_named() -> None:
    app = FastAPI()
    install_error_handlers(app)

    async def nothing() -> None:
        return None

    for number, method in enumerate(("GET", "POST")):
        app.add_api_route("/both", nothing, methods=[method], operation_id=str(number))
    router = APIRouter()
    router.add_api_route("/inner/{name}", nothing, methods=["PUT"])
    app.include_router(router)
    for path, methods in (("/both", "GET, POST"), ("/inner/a", "PUT")):
        answer = TestClient(app).delete(path)
        assert answer.status_code == 405
        assert answer.headers["allow"] == methods


def test_unforeseen_failures_are_told_without_details(caplog: pytest.LogCaptureFixture) -> None:
    app = FastAPI()
    install_error_handlers(app)

    @app.get("/")
    async def fail() -> None:
        raise ZeroDivisionError("secret")

    answer = TestClient(app, raise_server_exceptions=False).get("/")
    assert "secret" not in refusal(answer, 500)["message"]
    assert "not foreseen" in caplog.text
