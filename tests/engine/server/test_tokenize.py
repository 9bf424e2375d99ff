"""/tokenize, /detokenize and /v1/models."""

from __future__ import annotations

from engine.tokenizer import load_tokenizer
from tests.engine.server.tiny_served import CHAT_TEMPLATE, NAME, Served


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


def test_models(tiny: Served) -> None:
    (listed,) = tiny.request("GET", "/v1/models").json()["data"]
    assert listed["id"] == NAME
    assert listed["max_model_len"] == 512
    assert tiny.request("GET", f"/v1/models/{NAME}").json() == listed
    for other in ("other", "a/b", "a%2Fb", "%20"):
        answer = tiny.request("GET", f"/v1/models/{other}")
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"
