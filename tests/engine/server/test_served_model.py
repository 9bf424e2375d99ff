"""What a served model tells of itself, and what its folder says of sampling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ModelError
from engine.server.errors import ApiError
from engine.server.protocol import CompletionRequest
from engine.server.sampling_of import sampling_of, sampling_of_choice
from engine.server.served_model import ServedModel, generation_sampling
from tests.engine.server.scripted_engine import ScriptedEngine, output
from tests.engine.server.tiny_served import load_tiny, make_app, make_folder


def model(**fields: Any) -> ServedModel:
    given: dict[str, Any] = {
        "names": ("a", "b"),
        "root": "/models/a",
        "tokenizer": None,
        "chat_template": None,
        "max_model_len": 100,
        "vocab_size": 50,
    }
    return ServedModel(**{**given, **fields})


def sampling(served: ServedModel, **fields: Any) -> Any:
    body = CompletionRequest.model_validate_json(json.dumps({"prompt": "a", **fields}))
    return sampling_of(
        body, served, num_prompt_tokens=10, max_tokens=body.max_tokens, logprobs=None
    )


def test_names() -> None:
    served = model()
    assert served.name == "a"
    for name in (None, "a", "b"):
        served.check_name(name)
    with pytest.raises(ApiError, match="'c' is not served here: ask for 'a'"):
        served.check_name("c")


def test_the_folder_names_it(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "my-model")
    loaded, config = load_tiny(folder)
    assert ServedModel.of(loaded, config).names == ("my-model", str(folder))
    served = ServedModel.of(loaded, config, names=["x", "y"])
    assert served.names == ("x", "y")
    assert served.root == str(folder)
    assert served.max_model_len == 512
    assert served.chat_template is not None
    (tmp_path / "other.jinja").write_text("other")
    other = ServedModel.of(loaded, config, chat_template=tmp_path / "other.jinja")
    assert other.chat_template is not None
    assert other.chat_template.render([{"role": "user", "content": "a"}]) == "other"


def test_the_folders_sampling_is_the_default(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert generation_sampling(tmp_path) == {}
    stored = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 7, "eos_token_id": 1}
    stored |= {"repetition_penalty": "high"}
    (tmp_path / "generation_config.json").write_text(json.dumps(stored))
    found = generation_sampling(tmp_path)
    assert found == {"temperature": 0.6, "top_p": 0.9, "top_k": 20}
    served = model(default_sampling=found)
    left_out = sampling(served)
    assert (left_out.temperature, left_out.top_p, left_out.top_k) == (0.6, 0.9, 20)
    asked = sampling(served, temperature=0, top_k=-1)
    assert (asked.temperature, asked.top_p, asked.top_k) == (0.0, 0.9, -1)
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(ModelError, match="not valid JSON"):
        generation_sampling(tmp_path)


def test_each_output_has_a_seed_of_its_own() -> None:
    seeded = sampling(model(), seed=7)
    assert [sampling_of_choice(seeded, i).seed for i in range(3)] == [7, 8, 9]
    free = sampling(model())
    assert sampling_of_choice(free, 2).seed is None


def test_the_highest_seed_has_successors() -> None:
    last = sampling_of_choice(sampling(model(), seed=2**63 - 1), 3)
    assert last.seed is not None
    assert -(2**63) <= last.seed < 2**63


def test_stop_texts_need_a_tokenizer() -> None:
    with pytest.raises(ApiError, match="without a tokenizer"):
        sampling(model(), stop="a")


def test_a_model_without_tokenizer_or_template_serves_token_ids() -> None:
    from starlette.testclient import TestClient

    engine = ScriptedEngine([[output("", 4, 5), output("", 6)]])
    client = TestClient(make_app(model(), engine))
    answer = client.post("/v1/completions", json={"prompt": [1, 2], "return_token_ids": True})
    assert answer.json()["choices"][0]["token_ids"] == [4, 5, 6]
    for path, body in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/completions", {"prompt": [1], "echo": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [1]}),
    ):
        answer = client.post(path, json=body)
        assert answer.status_code == 400
        assert "tokenizer" in answer.json()["error"]["message"]
