"""From prompts as requests hold them to token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import from_json

from engine.server.chat_template import RESERVED, ChatTemplateError
from engine.server.errors import ApiError
from engine.server.protocol import ConversationFields, Message, Prompt
from engine.server.served_model import ServedModel
from engine.tokenizer import Tokenizer

# Characters from which on texts are encoded in a thread: the tokenizer is then busy for longer
# than a thread costs, and the event loop has streams to serve meanwhile.
_LONG_TEXT = 4096


async def encode(
    tokenizer: Tokenizer, texts: Sequence[str], *, add_special_tokens: bool
) -> list[list[int]]:
    """Token ids of texts; long ones do not hold up the event loop."""

    def encode_all() -> list[list[int]]:
        return [tokenizer.encode(text, add_special_tokens=add_special_tokens) for text in texts]

    if sum(map(len, texts)) < _LONG_TEXT:
        return encode_all()
    return await asyncio.to_thread(encode_all)


def check_token_ids(token_ids: Sequence[int], model: ServedModel) -> None:
    """See to it that the model has all these tokens.

    Raises:
        ApiError: 400, it has not.
    """
    highest = max(token_ids, default=0)
    if highest >= model.vocab_size:
        raise ApiError(
            400,
            f"token id {highest} is not in the vocabulary: this model's ids are below "
            f"{model.vocab_size}",
            code="invalid_token_id",
        )


async def prompt_ids(
    prompts: Sequence[Prompt],
    model: ServedModel,
    *,
    add_special_tokens: bool = True,
    truncate: int | None = None,
) -> list[list[int]]:
    """Token ids of prompts, all texts or none; `truncate` keeps so many at the end of each.

    Raises:
        ApiError: 400, the model cannot take them.
    """
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if texts:
        tokenizer = model.needs_tokenizer()
        found = await encode(tokenizer, texts, add_special_tokens=add_special_tokens)
    else:
        found = [prompt for prompt in prompts if not isinstance(prompt, str)]
    if truncate is not None:
        found = [ids[-truncate:] for ids in found]
    for ids in found:
        check_token_ids(ids, model)
    return found


def conversation_text(
    body: ConversationFields, model: ServedModel, *, hide_tools: bool = False
) -> str:
    """A conversation as the model's chat template writes it.

    Raises:
        ApiError: 400, there is no template, or it does not take these messages.
    """
    template = model.chat_template
    if template is None:
        raise ApiError(
            400,
            "this model has no chat template: use /v1/completions, or name a template's file when "
            "the server is started",
            code="no_chat_template",
        )
    variables = dict(body.chat_template_kwargs or {})
    taken = sorted(RESERVED & variables.keys())
    if taken:
        raise ApiError(
            400,
            f"chat_template_kwargs must not hold {taken[0]}",
            param="chat_template_kwargs",
            code="invalid_value",
        )
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
    going_on = bool(body.continue_final_message)
    if going_on and body.add_generation_prompt:
        raise ApiError(
            400,
            "continue_final_message and add_generation_prompt contradict each other: set one",
            param="add_generation_prompt",
            code="invalid_combination",
        )
    tools = None if hide_tools else body.tools
    try:
        return template.render(
            [_message(message) for message in body.messages],
            tools=[tool.model_dump(exclude_unset=True) for tool in tools] if tools else None,
            documents=body.documents,
            add_generation_prompt=not going_on and body.add_generation_prompt is not False,
            continue_final_message=going_on,
            variables=variables,
        )
    except ChatTemplateError as error:
        raise ApiError(400, str(error), param="messages", code="invalid_messages") from error


async def conversation_ids(
    body: ConversationFields,
    model: ServedModel,
    *,
    hide_tools: bool = False,
    truncate: int | None = None,
) -> list[int]:
    """Token ids of a conversation's prompt.

    Raises:
        ApiError: 400, as of `prompt_ids` and `conversation_text`.
    """
    model.needs_tokenizer()
    text = conversation_text(body, model, hide_tools=hide_tools)
    # The template writes special tokens itself.
    special = bool(body.add_special_tokens)
    (ids,) = await prompt_ids([text], model, add_special_tokens=special, truncate=truncate)
    return ids


def _message(message: Message) -> Mapping[str, Any]:
    """A message as templates take it: content is a text, arguments of calls are values."""
    fields = message.model_dump(exclude_unset=True)
    if isinstance(message.content, list):
        fields["content"] = "\n".join(part.text for part in message.content)
    fields.setdefault("content", None)
    for number, call in enumerate(message.tool_calls or ()):
        arguments = call.function.arguments
        if isinstance(arguments, str):
            fields["tool_calls"][number]["function"]["arguments"] = _arguments(arguments)
    return fields


def _arguments(text: str) -> Any:
    """What a call's arguments say; as they stand where a model wrote something else than JSON, for
    the conversation has to go on."""
    try:
        return from_json(text or "{}")  # refuses half characters, as `json` does not
    except ValueError:
        return text
