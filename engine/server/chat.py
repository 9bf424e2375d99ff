"""POST /v1/chat/completions: the next message of a conversation."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request
from pydantic import TypeAdapter
from starlette.responses import Response

from engine.output import RequestOutput
from engine.server.answers import GENERATES, documented
from engine.server.body import read_body
from engine.server.errors import ApiError
from engine.server.generation import Choice, Generation
from engine.server.logprobs import TokenTexts, chat_logprobs
from engine.server.prompts import conversation_ids
from engine.server.protocol import ChatCompletionRequest
from engine.server.request_id import request_id
from engine.server.responses import ChatCompletion, ChatCompletionChunk
from engine.server.sampling_of import check_prompt, sampling_of, sampling_of_choice
from engine.server.served_model import ServedModel
from engine.server.sse import DONE, Envelope, compact, event
from engine.server.stream_usage import StreamUsage
from engine.server.submits import Submits
from engine.server.usage import Usage

_BODY = TypeAdapter(ChatCompletionRequest)


def chat_route(model: ServedModel, engine: Submits) -> APIRouter:
    """The route on one model."""
    router = APIRouter()

    @router.post(
        "/v1/chat/completions",
        operation_id="createChatCompletion",
        summary="Generate the next message of a conversation",
        response_model=None,
        **documented(
            ChatCompletionRequest, ChatCompletion, errors=GENERATES, chunk=ChatCompletionChunk
        ),
    )
    async def create_chat_completion(request: Request) -> Response:
        body = await read_body(request, _BODY)
        model.check_name(body.model)
        return await _answer(body, model, engine, request_id(request, "chatcmpl"))

    return router


async def _answer(
    body: ChatCompletionRequest, model: ServedModel, engine: Submits, answer_id: str
) -> Response:
    if body.top_logprobs and not body.logprobs:
        raise ApiError(
            400,
            "top_logprobs is asked for without logprobs: set logprobs to true",
            param="top_logprobs",
            code="invalid_combination",
        )
    engine.admit(body.num_choices)  # before the work of reading the conversation
    ids = await conversation_ids(
        body,
        model,
        hide_tools=body.tool_choice == "none",
        truncate=body.truncate_prompt_tokens,
    )
    check_prompt(len(ids), model)
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    sampling = sampling_of(
        body,
        model,
        num_prompt_tokens=len(ids),
        max_tokens=asked,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    count = body.num_choices
    kind = "chat.completion.chunk" if body.stream else "chat.completion"
    envelope = Envelope(answer_id, kind, int(time.time()), model.name)
    usage = Usage([len(ids)], count)
    texts = TokenTexts(model.tokenizer, bool(body.return_tokens_as_token_ids))
    writer: _StreamWriter | _WholeWriter
    if body.stream:
        writer = _StreamWriter(body, envelope, usage, ids, texts)
    else:
        writer = _WholeWriter(body, envelope, usage, ids, texts)
    return Generation(
        engine,
        [Choice(ids, sampling_of_choice(sampling, i)) for i in range(count)],
        writer,
        stream=bool(body.stream),
        priority=body.priority or 0,
        cache_salt=body.cache_salt,
    )


class _StreamWriter:
    """A chunk for each output of a step, and before the first one of each choice its role."""

    def __init__(
        self,
        body: ChatCompletionRequest,
        envelope: Envelope,
        usage: Usage,
        prompt: list[int],
        texts: TokenTexts,
    ) -> None:
        self._envelope = envelope
        self._usage = StreamUsage(usage, body.stream_options)
        self._prompt = prompt
        self._texts = texts
        self._return_token_ids = bool(body.return_token_ids)
        self._begun = [False] * body.num_choices

    def write(self, choice: int, output: RequestOutput) -> bytes:
        """The chunks of an output."""
        reason = output.finish_reason
        if not output.token_ids and not output.text and reason is None:
            return b""
        role = b"" if self._begun[choice] else self._role(choice)
        self._begun[choice] = True
        self._usage.count(choice, output)
        logprobs = "null"
        if output.logprobs is not None:
            logprobs = compact(chat_logprobs(output.logprobs, self._texts))
        finish = "null" if reason is None else f'"{reason.value}"'
        ids = f',"token_ids":{compact(output.token_ids)}' if self._return_token_ids else ""
        return role + event(
            self._envelope.wrap(
                f'{{"index":{choice},"delta":{{"content":{compact(output.text)}}},'
                f'"logprobs":{logprobs},"finish_reason":{finish}{ids}}}',
                self._usage.member(),
            )
        )

    def end(self) -> bytes:
        """Usage, if it was asked for, and the end."""
        return self._usage.last(self._envelope) + DONE

    def _role(self, choice: int) -> bytes:
        ids = f',"prompt_token_ids":{compact(self._prompt)}' if self._return_token_ids else ""
        return event(
            self._envelope.wrap(
                f'{{"index":{choice},"delta":{{"role":"assistant","content":""}},'
                f'"logprobs":null,"finish_reason":null}}',
                ids + self._usage.member(),
            )
        )


class _WholeWriter:
    """One JSON text, when every output has ended."""

    def __init__(
        self,
        body: ChatCompletionRequest,
        envelope: Envelope,
        usage: Usage,
        prompt: list[int],
        texts: TokenTexts,
    ) -> None:
        self._envelope = envelope
        self._usage = usage
        self._prompt = prompt
        self._token_texts = texts
        self._return_token_ids = bool(body.return_token_ids)
        count = body.num_choices
        self._texts: list[list[str]] = [[] for _ in range(count)]
        self._token_ids: list[list[int]] = [[] for _ in range(count)]
        self._reasons = [""] * count
        self._logprobs: list[dict[str, Any] | None] = [None] * count

    def write(self, choice: int, output: RequestOutput) -> bytes:
        """Keep an output."""
        self._usage.count(choice, output)
        self._texts[choice].append(output.text)
        self._token_ids[choice] += output.token_ids
        if output.logprobs is not None:
            written = chat_logprobs(output.logprobs, self._token_texts)
            known = self._logprobs[choice]
            if known is None:
                self._logprobs[choice] = written
            else:
                known["content"] += written["content"]
        if output.finish_reason is not None:
            self._reasons[choice] = output.finish_reason.value
        return b""

    def end(self) -> bytes:
        """The whole answer."""
        choices = ",".join(compact(self._choice(i)) for i in range(len(self._texts)))
        tail = f',"usage":{self._usage.json()}'
        if self._return_token_ids:
            tail += f',"prompt_token_ids":{compact(self._prompt)}'
        return self._envelope.wrap(choices, tail).encode("ascii")

    def _choice(self, choice: int) -> dict[str, Any]:
        content = "".join(self._texts[choice])
        written: dict[str, Any] = {
            "index": choice,
            "message": {"role": "assistant", "content": content, "refusal": None},
            "logprobs": self._logprobs[choice],
            "finish_reason": self._reasons[choice],
        }
        if self._return_token_ids:
            written["token_ids"] = self._token_ids[choice]
        return written
