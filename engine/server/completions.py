"""POST /v1/completions: text that follows prompts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from pydantic import TypeAdapter
from starlette.responses import Response

from engine.output import RequestOutput
from engine.server.answers import GENERATES, documented
from engine.server.body import read_body
from engine.server.errors import ApiError
from engine.server.generation import Choice, Generation
from engine.server.logprobs import CompletionLogprobs, TokenTexts
from engine.server.prompts import check_token_ids, prompt_ids
from engine.server.protocol import CompletionRequest, Prompt
from engine.server.request_id import request_id
from engine.server.responses import Completion, CompletionChunk
from engine.server.sampling_of import check_prompt, sampling_of, sampling_of_choice
from engine.server.served_model import ServedModel
from engine.server.sse import DONE, Envelope, compact, event
from engine.server.stream_usage import StreamUsage
from engine.server.submits import Submits
from engine.server.usage import Usage

_BODY = TypeAdapter(CompletionRequest)


def completions_route(model: ServedModel, engine: Submits) -> APIRouter:
    """The route on one model."""
    router = APIRouter()

    @router.post(
        "/v1/completions",
        operation_id="createCompletion",
        summary="Generate text that follows prompts",
        response_model=None,
        **documented(CompletionRequest, Completion, chunk=CompletionChunk, errors=GENERATES),
    )
    async def create_completion(request: Request) -> Response:
        body = await read_body(request, _BODY)
        model.check_name(body.model)
        return await _answer(body, model, engine, request_id(request, "cmpl"))

    return router


async def _answer(
    body: CompletionRequest, model: ServedModel, engine: Submits, answer_id: str
) -> Response:
    if body.echo and body.logprobs is not None:
        raise ApiError(
            400,
            "echo with logprobs is not served: log-probabilities are of outputs alone",
            param="echo",
            code="unsupported_parameter",
        )
    nothing = body.max_tokens == 0
    if nothing and not body.echo:
        raise ApiError(
            400,
            "max_tokens=0 generates nothing: give at least 1, or set echo",
            param="max_tokens",
            code="invalid_combination",
        )
    count = body.num_choices
    if not nothing:  # before the work of reading prompts
        engine.admit(count * len(body.prompt))
    prompts = await prompt_ids(
        body.prompt,
        model,
        add_special_tokens=body.add_special_tokens is not False,
        truncate=body.truncate_prompt_tokens,
    )
    choices: list[Choice] = []
    for ids in prompts:
        check_prompt(len(ids), model)
        sampling = sampling_of(
            body,
            model,
            num_prompt_tokens=len(ids),
            max_tokens=1 if nothing else body.max_tokens,
            logprobs=body.logprobs,
        )
        choices += [Choice(ids, sampling_of_choice(sampling, i)) for i in range(count)]
    echoes = [_echo(prompt, model) for prompt in body.prompt] if body.echo else []
    envelope = Envelope(answer_id, "text_completion", int(time.time()), model.name)
    usage = Usage([len(ids) for ids in prompts], count)
    writer: _StreamWriter | _WholeWriter
    texts = TokenTexts(model.tokenizer, bool(body.return_tokens_as_token_ids))
    if body.stream:
        writer = _StreamWriter(body, envelope, usage, prompts, echoes, texts)
    else:
        writer = _WholeWriter(body, envelope, usage, prompts, echoes, texts)
    return Generation(
        engine,
        [] if nothing else choices,
        writer,
        stream=bool(body.stream),
        priority=body.priority or 0,
        cache_salt=body.cache_salt,
    )


def _echo(prompt: Prompt, model: ServedModel) -> str:
    if isinstance(prompt, str):
        return prompt
    check_token_ids(prompt, model)
    return model.needs_tokenizer().decode(prompt)


class _StreamWriter:
    """A chunk for each output of a step."""

    def __init__(
        self,
        body: CompletionRequest,
        envelope: Envelope,
        usage: Usage,
        prompts: Sequence[list[int]],
        echoes: Sequence[str],
        texts: TokenTexts,
    ) -> None:
        count = len(prompts) * body.num_choices
        self._envelope = envelope
        self._usage = StreamUsage(usage, body.stream_options)
        self._prompts = prompts
        self._num_choices = body.num_choices
        self._echoes = echoes
        self._return_token_ids = bool(body.return_token_ids)
        self._begun = [False] * count
        self._only_echo = body.max_tokens == 0
        self._logprobs = [CompletionLogprobs(texts) for _ in range(count)]

    def write(self, choice: int, output: RequestOutput) -> bytes:
        """The chunk of an output."""
        self._usage.count(choice, output)
        reason = output.finish_reason
        if not output.token_ids and not output.text and reason is None:
            return b""
        logprobs = "null"
        if output.logprobs is not None:
            logprobs = compact(self._logprobs[choice].write(output.logprobs))
        finish = "null" if reason is None else f'"{reason.value}"'
        return self._chunk(choice, output.text, output.token_ids, logprobs, finish)

    def end(self) -> bytes:
        """Usage, if it was asked for, and the end."""
        chunks = []
        if self._only_echo:
            chunks = [self._chunk(i, "", [], "null", '"length"') for i in range(len(self._begun))]
        return b"".join(chunks) + self._usage.last(self._envelope) + DONE

    def _chunk(
        self, choice: int, text: str, token_ids: list[int], logprobs: str, finish: str
    ) -> bytes:
        first = not self._begun[choice]
        self._begun[choice] = True
        prompt = choice // self._num_choices
        if first and self._echoes:
            text = self._echoes[prompt] + text
        ids = ""
        if self._return_token_ids:
            ids = f',"token_ids":{compact(token_ids)}'
            if first:
                ids += f',"prompt_token_ids":{compact(self._prompts[prompt])}'
        return event(
            self._envelope.wrap(
                f'{{"index":{choice},"text":{compact(text)},"logprobs":{logprobs},'
                f'"finish_reason":{finish}{ids}}}',
                self._usage.member(),
            )
        )


class _WholeWriter:
    """One JSON text, when every output has ended."""

    def __init__(
        self,
        body: CompletionRequest,
        envelope: Envelope,
        usage: Usage,
        prompts: Sequence[list[int]],
        echoes: Sequence[str],
        texts: TokenTexts,
    ) -> None:
        count = body.num_choices
        self._envelope = envelope
        self._usage = usage
        self._prompts = prompts
        self._num_choices = count
        self._return_token_ids = bool(body.return_token_ids)
        self._texts = [[echoes[i // count] if echoes else ""] for i in range(len(prompts) * count)]
        self._token_ids: list[list[int]] = [[] for _ in self._texts]
        self._reasons = ["length"] * len(self._texts)
        self._logprobs: list[dict[str, Any] | None] = [None] * len(self._texts)
        self._writers = [CompletionLogprobs(texts) for _ in self._texts]

    def write(self, choice: int, output: RequestOutput) -> bytes:
        """Keep an output."""
        self._usage.count(choice, output)
        self._texts[choice].append(output.text)
        self._token_ids[choice] += output.token_ids
        if output.logprobs is not None:
            written = self._writers[choice].write(output.logprobs)
            known = self._logprobs[choice]
            if known is None:
                self._logprobs[choice] = written
            else:
                for name, values in written.items():
                    known[name] += values
        if output.finish_reason is not None:
            self._reasons[choice] = output.finish_reason.value
        return b""

    def end(self) -> bytes:
        """The whole answer."""
        choices = ",".join(compact(self._choice(i)) for i in range(len(self._texts)))
        return self._envelope.wrap(choices, f',"usage":{self._usage.json()}').encode("ascii")

    def _choice(self, choice: int) -> dict[str, Any]:
        written: dict[str, Any] = {
            "index": choice,
            "text": "".join(self._texts[choice]),
            "logprobs": self._logprobs[choice],
            "finish_reason": self._reasons[choice],
        }
        if self._return_token_ids:
            written["token_ids"] = self._token_ids[choice]
            written["prompt_token_ids"] = self._prompts[choice // self._num_choices]
        return written
