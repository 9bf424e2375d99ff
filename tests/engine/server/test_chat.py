"""/v1/chat/completions on a real engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.engine.server.tiny_served import Served

PATH = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "The fox"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.fixture(autouse=True)
def _leaves_nothing(tiny: Served) -> Iterator[None]:
    yield
    tiny.assert_idle()


def prompt_of(tiny: Served, **body: Any) -> str:
    """The text that a conversation became."""
    answer = tiny.post(PATH, max_tokens=1, return_token_ids=True, **body)
    assert answer.status_code == 200, answer.text
    tokens = answer.json()["prompt_token_ids"]
    return str(tiny.post("/detokenize", tokens=tokens).json()["prompt"])


def test_the_template_writes_the_prompt(tiny: Served) -> None:
    messages = [{"role": "system", "content": "Be."}, *HELLO]
    text = "<s>system: Be.\nuser: The fox\nassistant:"
    assert prompt_of(tiny, messages=messages) == text
    assert prompt_of(tiny, messages=messages, max_completion_tokens=1) == text
    parts = [{"type": "text", "text": "The"}, {"type": "text", "text": "fox"}]
    assert "user: The\nfox\n" in prompt_of(tiny, messages=[{"role": "user", "content": parts}])
    plain = prompt_of(tiny, messages=messages, add_generation_prompt=False)
    assert plain == text.removesuffix("assistant:")
    going_on = [*HELLO, {"role": "assistant", "content": "jumps"}]
    text = prompt_of(tiny, messages=going_on, continue_final_message=True)
    assert text == "<s>user: The fox\nassistant: jumps"


def test_tools_pass_through_the_template(tiny: Served) -> None:
    text = prompt_of(tiny, messages=HELLO, tools=[TOOL])
    assert '{"type": "function", "function": {"name": "weather"' in text
    assert "weather" not in prompt_of(tiny, messages=HELLO, tools=[TOOL], tool_choice="none")
    call = {"id": "1", "type": "function", "function": {"name": "weather"}}
    for arguments, written in (
        ('{"city": "Pisa"}', "Pisa\n"),
        ("{broken", "\n"),
        (r'{"city": "\ud800"}', "\n"),  # half a character, which no tokenizer takes
    ):
        call["function"] = {"name": "weather", "arguments": arguments}
        messages = [*HELLO, {"role": "assistant", "tool_calls": [call]}]
        text = prompt_of(tiny, messages=messages)
        assert f"assistant: None\n{written}assistant:" in text


@pytest.mark.parametrize("stream", [False, True])
def test_answers_are_completions_of_the_prompt(tiny: Served, stream: bool) -> None:
    params: dict[str, Any] = {"temperature": 0.8, "seed": 3, "max_tokens": 12, "n": 2}
    tokens = tiny.post("/tokenize", messages=HELLO).json()["tokens"]
    wanted = tiny.post("/v1/completions", prompt=tokens, **params).json()
    texts = [c["text"] for c in wanted["choices"]]
    if stream:
        found, roles, reasons = ["", ""], [0, 0], ["", ""]
        options = {"include_usage": True}
        *chunks, last = tiny.events(PATH, messages=HELLO, stream_options=options, **params)
        for chunk in chunks:
            (choice,) = chunk["choices"]
            i = choice["index"]
            if "role" in choice["delta"]:
                assert choice["delta"] == {"role": "assistant", "content": ""}
                assert found[i] == ""
                roles[i] += 1
            found[i] += choice["delta"]["content"]
            reasons[i] = choice["finish_reason"]
        assert roles == [1, 1]
        assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
        assert last["choices"] == []
        usage = last["usage"]
    else:
        answer = tiny.post(PATH, messages=HELLO, **params).json()
        assert answer["object"] == "chat.completion"
        assert [c["message"]["role"] for c in answer["choices"]] == ["assistant"] * 2
        found = [c["message"]["content"] for c in answer["choices"]]
        reasons = [c["finish_reason"] for c in answer["choices"]]
        usage = answer["usage"]
    assert found == texts
    assert reasons == [c["finish_reason"] for c in wanted["choices"]]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert usage[name] == wanted["usage"][name]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(tiny: Served, stream: bool) -> None:
    body = {"messages": HELLO, "max_tokens": 6, "temperature": 0, "logprobs": True}
    body |= {"top_logprobs": 2, "return_token_ids": True, "ignore_eos": True}
    entries, tokens = [], []
    if stream:
        for chunk in tiny.events(PATH, **body):
            choice = chunk["choices"][0]
            if choice["logprobs"] is not None:
                entries += choice["logprobs"]["content"]
                tokens += choice["token_ids"]
    else:
        choice = tiny.post(PATH, **body).json()["choices"][0]
        entries, tokens = choice["logprobs"]["content"], choice["token_ids"]
    assert len(entries) == len(tokens) == 6
    for entry, token in zip(entries, tokens, strict=True):
        assert len(entry["top_logprobs"]) == 2
        assert entry["top_logprobs"][0] == {
            k: v for k, v in entry.items() if k != "top_logprobs"
        }  # greedy
        assert entry["token"] == bytes(entry["bytes"]).decode("utf-8", "replace")
        assert tiny.post("/detokenize", tokens=[token]).json()["prompt"] == entry["token"]


def test_logprobs_without_likeliest_and_as_ids(tiny: Served) -> None:
    body = {"messages": HELLO, "max_tokens": 2, "logprobs": True, "return_token_ids": True}
    choice = tiny.post(PATH, return_tokens_as_token_ids=True, **body).json()["choices"][0]
    assert [e["token"] for e in choice["logprobs"]["content"]] == [
        f"token_id:{i}" for i in choice["token_ids"]
    ]
    assert all(e["top_logprobs"] == [] for e in choice["logprobs"]["content"])
