"""The official client of OpenAI's API works unchanged."""

from __future__ import annotations

import openai
import pytest

from engine.server.refusals import Overloaded
from tests.engine.server.tiny_served import NAME, Served

MESSAGES = [{"role": "user", "content": "The fox"}]


def client_of(tiny: Served) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url="http://tiny/v1", api_key="none", http_client=tiny.client(), max_retries=0
    )


def test_models(tiny: Served) -> None:
    async def run() -> None:
        async with client_of(tiny) as client:
            (model,) = (await client.models.list()).data
            assert model.id == NAME
            assert (await client.models.retrieve(NAME)).id == NAME
            with pytest.raises(openai.NotFoundError, match="not served here"):
                await client.models.retrieve("gpt/4")

    tiny.run(run())


def test_completions(tiny: Served) -> None:
    async def run() -> None:
        async with client_of(tiny) as client:
            whole = await client.completions.create(
                model=NAME, prompt=["The fox", "a"], max_tokens=8, temperature=0, logprobs=2
            )
            assert whole.usage is not None
            assert whole.choices[0].logprobs is not None
            assert whole.choices[0].logprobs.tokens is not None
            stream = await client.completions.create(
                model=NAME, prompt="The fox", max_tokens=8, temperature=0, stream=True
            )
            text = "".join([chunk.choices[0].text async for chunk in stream])
            assert text == whole.choices[0].text

    tiny.run(run())
    tiny.assert_idle()


def test_chats(tiny: Served) -> None:
    async def run() -> None:
        async with client_of(tiny) as client:
            whole = await client.chat.completions.create(
                model=NAME, messages=MESSAGES, max_completion_tokens=8, temperature=0
            )
            stream = await client.chat.completions.create(
                model=NAME,
                messages=MESSAGES,
                max_completion_tokens=8,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
            *chunks, last = [chunk async for chunk in stream]
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            assert text == whole.choices[0].message.content
            assert last.usage is not None
            assert whole.usage is not None
            assert last.usage.total_tokens == whole.usage.total_tokens

    tiny.run(run())
    tiny.assert_idle()


def test_errors_are_the_clients(tiny: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with client_of(tiny) as client:
            with pytest.raises(openai.NotFoundError) as missing:
                await client.completions.create(model="gpt-4", prompt="a")
            assert missing.value.code == "model_not_found"
            with pytest.raises(openai.BadRequestError) as bad:
                await client.completions.create(model=NAME, prompt="a", temperature=-1)
            assert bad.value.param == "temperature"

            def full(*_args: object, **_options: object) -> None:
                raise Overloaded("full", 9)

            monkeypatch.setattr(tiny.engine, "submit", full)
            with pytest.raises(openai.RateLimitError) as busy:
                await client.completions.create(model=NAME, prompt="a")
            assert busy.value.response.headers["retry-after"] == "9"

    tiny.run(run())


def test_a_client_that_stops_reading_leaves_nothing(tiny: Served) -> None:
    async def run() -> None:
        async with client_of(tiny) as client:
            stream = await client.completions.create(
                model=NAME, prompt="The fox", max_tokens=400, stream=True
            )
            async for _ in stream:
                break
            await stream.close()

    tiny.run(run())
    tiny.assert_idle()
