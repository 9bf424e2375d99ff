"""/tokenize, /detokenize and /v1/models."""

from __future__ import annotations

from starlette.testclient import TestClient
from tokenizers import processors

from engine.tokenizer import Tokenizer, load_tokenizer
from tests.engine.server.scripted_engine import ScriptedEngine
from tests.engine.server.test_served_model import model
from tests.engine.server.tiny_served import CHAT_TEMPLATE, NAME, Served, make_app
from tests.engine.tiny_tokenizers import byte_level


def test_texts(tiny: Served, tiny_folder: object) -> None:
    tokenizer = load_tokenizer(str(tiny_folder))
    for text in ("", "The quick brown fox", "naïve 🙂 </s>", "long " * 2000):
        ids = tokenizer.encode(text)
        answer = tiny.post("/tokenize", prompt=text, return_token_strs=True).json()
        assert answer == {
            "count": len(ids),
            "max_model_len": 512,
            "tokens": ids,
            "token_strs": [tokenizer.piece(i) for i in ids],
        }
        assert tiny.post("/detokenize", tokens=ids).json() == {"prompt": text}
    assert tiny.post("/tokenize", prompt="a").json()["token_strs"] is None


def test_conversations(tiny: Served) -> None:
    assert "bos_token" in CHAT_TEMPLATE
    answer = tiny.post("/tokenize", messages=[{"role": "user", "content": "Hi"}]).json()
    text = tiny.post("/detokenize", tokens=answer["tokens"]).json()["prompt"]
    assert text == "<s>user: Hi\nassistant:"


def test_special_tokens_are_added_if_asked_for() -> None:
    backend = byte_level()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    served = model(tokenizer=Tokenizer(backend), vocab_size=500, chat_template=None)
    client = TestClient(make_app(served, ScriptedEngine([])))

    def tokens(**body: object) -> list[int]:
        return list(client.post("/tokenize", json=body).json()["tokens"])

    assert tokens(prompt="fox")[0] == 0
    assert tokens(prompt="fox", add_special_tokens=False) == tokens(prompt="fox")[1:]


def test_models(tiny: Served) -> None:
    (listed,) = tiny.request("GET", "/v1/models").json()["data"]
    assert listed["id"] == NAME
    assert listed["max_model_len"] == 512
    assert tiny.request("GET", f"/v1/models/{NAME}").json() == listed
    for other in ("other", "a/b", "a%2Fb", "%20"):
        answer = tiny.request("GET", f"/v1/models/{other}")
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"
