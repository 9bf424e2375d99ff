"""What is found out about a server before it is loaded, and the servers that are none."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from autotune.embedded import TARGET
from autotune.errors import BadInput, EnvironmentMissing, Interrupted
from autotune.load.discover import Server, discover
from autotune.load.endpoint import EXTENSIONS, server_url
from engine.tokenizer import load_tokenizer
from tests.autotune.load.fake_server import FakeServer, serving


def found(server: FakeServer, **options: Any) -> Server:
    with serving(server):
        return discover(server.url, **options)


def test_a_server_like_ours_understands_everything() -> None:
    server = FakeServer(key="k")
    seen = found(server, api_key="k")
    assert seen.endpoint.url == server.url
    assert seen.endpoint.model == "fake"
    assert seen.endpoint.prompts == "token_ids"
    assert seen.endpoint.extensions == EXTENSIONS
    assert seen.max_model_len == 512
    assert len(seen.vocabulary) > 100
    assert all(3 <= i < server.vocab_size for i in seen.vocabulary)
    assert seen.notes == []
    assert all(header["Authorization"] == "Bearer k" for header in server.headers)


@pytest.mark.parametrize(
    ("refused", "left"),
    [
        ({"return_token_ids"}, {"usage", "ignore_eos", "continuous_usage"}),
        ({"return_token_ids", "continuous_usage_stats"}, {"usage", "ignore_eos"}),
        ({"return_token_ids", "stream_options"}, {"ignore_eos"}),
        ({"return_token_ids", "ignore_eos"}, {"usage"}),
        ({"return_token_ids", "stream_options", "ignore_eos"}, set()),
    ],
)
def test_what_a_server_refuses_is_left_out(refused: set[str], left: set[str]) -> None:
    seen = found(FakeServer(refused_fields=frozenset(refused)))
    assert seen.endpoint.extensions == left


async def texts_only(
    server: FakeServer, request: web.Request, body: dict[str, Any]
) -> web.StreamResponse:
    if isinstance(body.get("prompt"), list):
        return server.error(422, "prompt must be a string")
    return await server.stream(request, body)


def test_texts_are_sent_to_servers_that_take_no_ids() -> None:
    seen = found(FakeServer(behaviour=texts_only), tokenizer=load_tokenizer(TARGET))
    assert seen.endpoint.prompts == "text"
    assert "takes no token ids" in seen.notes[0]
    with pytest.raises(BadInput, match="prompt must be a string"):
        found(FakeServer(behaviour=texts_only))
    with pytest.raises(BadInput, match="prompt must be a string"):
        found(
            FakeServer(behaviour=texts_only),
            tokenizer=load_tokenizer(TARGET),
            prompts="token_ids",
        )


def test_the_tokenizer_of_a_local_model_is_found() -> None:
    models = {"data": [{"id": "m", "root": str(TARGET)}]}
    seen = found(FakeServer(models=models, tokenizes=False, vocab_size=4096))
    assert seen.tokenizer is not None
    assert str(TARGET) in seen.notes[0]
    assert seen.max_model_len is None


def test_a_local_folder_that_holds_no_tokenizer_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("no tokenizer")
    for name in (str(tmp_path), "/" + "x" * 5000, "/\0"):
        seen = found(FakeServer(models=models("m", root=name)))
        assert seen.tokenizer is None
        assert len(seen.vocabulary) > 100


@pytest.mark.parametrize("tokens", [[], ["a"], [-1], [1 << 60], [True]])
def test_tokens_that_are_none(tokens: list[Any]) -> None:
    with pytest.raises(BadInput, match="--tokenizer FOLDER"):
        found(FakeServer(tokens=tokens))


def test_without_a_tokenizer_there_is_nothing_to_send() -> None:
    with pytest.raises(BadInput, match="--tokenizer FOLDER"):
        found(FakeServer(tokenizes=False))


def models(*names: str, **more: Any) -> dict[str, Any]:
    return {"data": [{"id": name, **more} for name in names]}


def test_the_model_is_chosen_by_name() -> None:
    assert found(FakeServer(models=models("a", "b")), model="b").endpoint.model == "b"
    # Two names of one model.
    assert found(FakeServer(models=models("a", "b", root="r"))).endpoint.model == "a"
    assert found(FakeServer(models=models("a", "b", root=["r"]))).endpoint.model == "a"
    with pytest.raises(BadInput, match="--served-model: a, b"):
        found(FakeServer(models=models("a", "b")))
    with pytest.raises(BadInput, match="serves no model 'c'; it has a, b"):
        found(FakeServer(models=models("a", "b")), model="c")


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        ("<html>", BadInput, "no server of OpenAI's protocol"),
        ({"data": "x"}, BadInput, "no server of OpenAI's protocol"),
        ({"data": [{"name": "x"}]}, BadInput, "no server of OpenAI's protocol"),
        ({"data": []}, EnvironmentMissing, "serves no model"),
    ],
)
def test_what_is_no_list_of_models(answer: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        found(FakeServer(models=answer))


def test_keys() -> None:
    with pytest.raises(BadInput, match=r"error 401: no valid key; put .* --api-key-env"):
        found(FakeServer(key="k"))
    with pytest.raises(BadInput, match="printable ASCII") as caught:
        discover("http://127.0.0.1:9", api_key="a\r\nb")
    assert "a\r\nb" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "error"), [(404, BadInput), (503, EnvironmentMissing), (500, EnvironmentMissing)]
)
def test_a_server_that_completes_nothing(status: int, error: type[Exception]) -> None:
    async def answer(
        server: FakeServer, request: web.Request, body: dict[str, Any]
    ) -> web.StreamResponse:
        return server.error(status, "not now")

    with pytest.raises(error, match=f"error {status}: not now"):
        found(FakeServer(behaviour=answer))


def test_a_first_answer_that_is_none() -> None:
    async def answer(
        server: FakeServer, request: web.Request, body: dict[str, Any]
    ) -> web.StreamResponse:
        return web.Response(text="hello")

    with pytest.raises(BadInput, match=r"does not complete a prompt: .*no stream"):
        found(FakeServer(behaviour=answer))


def test_nobody_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(EnvironmentMissing, match="cannot be reached: no connection: connection"):
        discover(f"http://127.0.0.1:{port}")
    with pytest.raises(EnvironmentMissing, match="cannot be reached"):
        discover("http://no-such-host.invalid:8000")
    for url in ("http://..:8000", f"http://{'x' * 70}:8000", "http://127.0.0.1:0"):
        with pytest.raises(EnvironmentMissing, match="cannot be reached: no connection"):
            discover(url)


def test_another_kind_of_server() -> None:
    with serving(FakeServer()) as server, pytest.raises(BadInput, match="no server of OpenAI's"):
        discover(f"{server.url}/elsewhere")


def test_an_answer_that_does_not_come_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer() -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            while True:
                connection.sendall(b" ")
                time.sleep(0.05)

    monkeypatch.setattr("autotune.load.discover._ASK_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with pytest.raises(EnvironmentMissing, match=r"no answer within 0\.3 s"):
            discover(f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread.join(5)


def test_a_server_that_never_answers_can_be_left() -> None:
    stop = threading.Event()
    timer = threading.Timer(0.2, stop.set)
    timer.start()
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(Interrupted):
        discover(f"http://127.0.0.1:{silent.getsockname()[1]}", stop=stop)
    timer.join()


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://host:8000", "http://host:8000"),
        ("http://host:8000/", "http://host:8000"),
        (" https://host/v1/ ", "https://host"),
        ("http://host/base/v1/chat/completions", "http://host/base"),
        ("http://[::1]:80/v1/models", "http://[::1]:80"),
    ],
)
def test_addresses(given: str, url: str) -> None:
    assert server_url(given) == url


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("host:8000", "not the address of a server"),
        ("ftp://host", "not the address of a server"),
        ("http://host:port", "not the address of a server"),
        ("http://[::1", "not the address of a server"),
        ("http://[host]:80", "not the address of a server"),
        ("http://", "names no host"),
        ("http://user:pass@host", "--api-key-env"),
        ("http://host/?a=1", "more than a path"),
    ],
)
def test_what_is_no_address(given: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        server_url(given)
