"""Answers that generate while they are sent: clients that leave, engines that fail."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from engine.errors import RequestRefused
from engine.output import RequestOutput
from engine.request import FinishReason, SamplingParams
from engine.server.generation import Choice, Generation
from engine.server.refusals import Draining, EngineFailed, Overloaded, TimedOut
from tests.engine.server.scripted_engine import ScriptedEngine, output
from tests.engine.server.test_served_model import model
from tests.engine.server.tiny_served import make_app

END = FinishReason.LENGTH


class PlainWriter:
    """The texts as they come, or joined."""

    def __init__(self, stream: bool) -> None:
        self.stream = stream
        self.kept = b""

    def write(self, choice: int, output: RequestOutput) -> bytes:
        content = f"{choice}{output.text} ".encode()
        if self.stream:
            return content
        self.kept += content
        return b""

    def end(self) -> bytes:
        return self.kept + b"end"


class Client:
    """One HTTP exchange as a server would have it."""

    def __init__(self, leaves_after: int | None = None, fails: bool = False) -> None:
        self.sent: list[dict[str, Any]] = []
        self.leaves_after = leaves_after
        self.fails = fails
        self.left = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if self.fails:
            raise OSError("connection reset")
        self.sent.append(message)
        if len(self.sent) == self.leaves_after:
            self.left.set()

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {k.decode(): v.decode() for k, v in self.sent[0]["headers"]}

    @property
    def body(self) -> str:
        return b"".join(m["body"] for m in self.sent[1:]).decode()


def answer(engine: ScriptedEngine, client: Client | None = None, stream: bool = True) -> Client:
    """Have an engine's scripts answered, one choice for each; nothing may be left behind."""

    async def run() -> Client:
        there = client or Client()
        choices = [Choice([1], SamplingParams()) for _ in engine.scripts]
        generation = Generation(engine, choices, PlainWriter(stream), stream=stream, priority=7)
        try:
            await asyncio.wait_for(generation({"type": "http"}, there.receive, there.send), 20)
        finally:
            assert asyncio.all_tasks() == {asyncio.current_task()}
        return there

    done = asyncio.run(run())
    assert all(stream.aborted for stream in engine.streams)
    return done


def test_outputs_are_sent_as_they_come() -> None:
    engine = ScriptedEngine([[output("a", 1), output("b", 2, reason=END)]])
    client = answer(engine)
    assert client.status == 200
    assert client.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert [m["body"] for m in client.sent[1:]] == [b"0a ", b"0b ", b"end"]
    assert [m["more_body"] for m in client.sent[1:]] == [True, True, False]
    assert engine.submitted == [([1], SamplingParams(), 7)]


def test_a_whole_answer_tells_its_length() -> None:
    client = answer(ScriptedEngine([[output("a", 1, reason=END)]]), stream=False)
    assert client.headers == {"content-type": "application/json", "content-length": "6"}
    assert client.body == "0a end"


@pytest.mark.parametrize("stream", [True, False])
def test_several_outputs_are_merged(stream: bool) -> None:
    scripts = [[output(f"{i}-{j}", j) for j in range(3)] for i in range(5)]
    words = answer(ScriptedEngine([*scripts]), stream=stream).body.split()
    assert words.pop() == "end"
    for i in range(5):
        assert [w for w in words if w.startswith(str(i))] == [f"{i}{i}-{j}" for j in range(3)]


@pytest.mark.parametrize("choices", [1, 3])
@pytest.mark.parametrize("leaves_after", [2, 3])
def test_a_client_that_leaves_ends_the_requests(choices: int, leaves_after: int) -> None:
    engine = ScriptedEngine([[output("a", 1), output("b", 2), None] for _ in range(choices)])
    answer(engine, Client(leaves_after))
    assert len(engine.streams) == choices


def test_a_client_that_leaves_before_the_first_token_ends_the_request() -> None:
    gone = Client()
    gone.left.set()
    engine = ScriptedEngine([[None], [None]])
    assert answer(engine, gone, stream=False).sent == []


def test_a_connection_that_breaks_ends_the_request() -> None:
    engine = ScriptedEngine([[output("a", 1), None]])
    with pytest.raises(OSError, match="reset"):
        answer(engine, Client(fails=True))
    assert engine.streams[0].aborted


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (Overloaded("full", 2.2), 429, "server_overloaded"),
        (Draining("ending"), 503, "server_draining"),
        (EngineFailed("broken"), 503, "engine_failed"),
        (TimedOut("late"), 504, "request_timeout"),
        (RequestRefused("too long"), 400, "request_refused"),
        (ZeroDivisionError("secret"), 500, "internal"),
    ],
)
@pytest.mark.parametrize("where", ["admit", "submit", "stream"])
@pytest.mark.parametrize("stream", [True, False])
def test_errors_before_the_first_token_have_their_status(
    error: Exception, status: int, code: str, where: str, stream: bool
) -> None:
    good = [output("a", 1, reason=END)]
    engine = ScriptedEngine([[None], [error] if where == "stream" else error])
    if where == "admit":
        engine = ScriptedEngine([good, good], refuses=error)
    client = answer(engine, stream=stream)
    assert client.status == status
    told = json.loads(client.body)["error"]
    assert told["code"] == code
    assert set(told) == {"message", "type", "param", "code"}
    assert ("secret" in told["message"]) is False
    retry = client.headers.get("retry-after")
    assert retry == {429: "3", 503: "1" if code == "server_draining" else None}.get(status)


def test_an_error_after_the_first_token_is_an_event() -> None:
    client = answer(ScriptedEngine([[output("a", 1), EngineFailed("broken")]]))
    assert client.status == 200
    first, events = client.body[:3], client.body[3:]
    failed, done, rest = events.split("\n\n")
    assert first == "0a "
    assert json.loads(failed.removeprefix("data: "))["error"]["message"] == "broken"
    assert (done, rest) == ("data: [DONE]", "")
    assert client.sent[-1]["more_body"] is False


def test_an_error_of_one_choice_ends_the_others() -> None:
    engine = ScriptedEngine([[None], [output("a", 1), TimedOut("late")]])
    assert "late" in answer(engine).body
    assert all(stream.aborted for stream in engine.streams)


def test_a_full_server_turns_requests_away_before_it_reads_prompts() -> None:
    engine = ScriptedEngine([], refuses=Overloaded("full", 3))
    client = TestClient(make_app(model(), engine))
    for path, body in (
        ("/v1/completions", {"prompt": "a text, which this model cannot read"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ):
        answer = client.post(path, json=body)
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "3"
