"""The bodies of requests, as OpenAI's API and vLLM's have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PlainValidator, WithJsonSchema

from engine.server.request_fields import WHOLE, Fields, GenerationFields, Items, TokenId, whole

_PROMPTS = 2048
_TOKEN_IDS = {"type": "integer", "minimum": 0, "exclusiveMaximum": 2**31}
_PROMPT_FORMS = (
    "must be a text, a list of texts, a list of token ids or a list of lists of token ids"
)

Prompt = str | list[int]


def _prompts(value: object) -> list[Prompt]:
    """The prompts of a body.

    By hand: pydantic would look at each of thousands of token ids once for every form there is.

    Raises:
        ValueError: it has none of the forms.
    """
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise ValueError(_PROMPT_FORMS)
    if not value:
        raise ValueError("is an empty list: give at least one prompt")
    if type(value[0]) in (int, float):
        return [_token_ids(value)]
    if len(value) > _PROMPTS:
        raise ValueError(f"holds {len(value)} prompts, and a request may hold {_PROMPTS}")
    if all(isinstance(item, str) for item in value):
        return value
    if all(isinstance(item, list) for item in value):
        return [_token_ids(item) for item in value]
    raise ValueError(_PROMPT_FORMS)


def _token_ids(ids: list[Any]) -> list[int]:
    if not ids:
        raise ValueError("holds an empty list of token ids: give at least one token")
    if not all(type(i) is int for i in ids):
        ids = [whole(i) for i in ids]
        if not all(type(i) is int for i in ids):
            raise ValueError(_PROMPT_FORMS)
    if min(ids) < 0 or max(ids) >= 2**31:
        raise ValueError("holds a token id that is negative or above 2147483647")
    return ids


Prompts = Annotated[
    Sequence[Prompt],
    PlainValidator(_prompts),
    WithJsonSchema(
        {
            "description": "One prompt or several, each a text or token ids.",
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {"type": "string"},
                    "minItems": 1,
                    "maxItems": _PROMPTS,
                },
                {"type": "array", "items": _TOKEN_IDS, "minItems": 1},
                {
                    "type": "array",
                    "items": {"type": "array", "items": _TOKEN_IDS, "minItems": 1},
                    "minItems": 1,
                    "maxItems": _PROMPTS,
                },
            ],
        }
    ),
]


class CompletionRequest(GenerationFields):
    """Text that follows prompts."""

    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0, lt=2**31), WHOLE] | None = Field(
        16, description="Most tokens of an output; null means up to the model's limit."
    )
    echo: bool | None = Field(None, description="Begin outputs with their prompts.")
    logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = Field(
        None, description="Tell log-probabilities of each token and of so many likeliest ones."
    )
    add_special_tokens: bool | None = Field(
        None, description="Whether prompts begin with the tokenizer's special tokens; they do."
    )
    best_of: Annotated[int, Field(ge=1, le=1), WHOLE] | None = None
    suffix: None = None
    prompt_embeds: None = None


class TextPart(Fields):
    """A part of a message's content."""

    model_config = ConfigDict(extra="allow")

    type: Literal["text"]
    text: str


class CalledFunction(Fields):
    """What an assistant called; `arguments` is JSON written as a text."""

    model_config = ConfigDict(extra="allow")

    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(Fields):
    """An assistant's call of a tool."""

    model_config = ConfigDict(extra="allow")

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Fields):
    """A message of a conversation; further fields are passed to the chat template."""

    model_config = ConfigDict(extra="allow")

    role: Annotated[str, Field(min_length=1)]
    content: str | Items[TextPart] | None = None
    name: str | None = None
    tool_calls: Items[ToolCall] | None = None
    tool_call_id: str | None = None


class Function(Fields):
    """A function that the model may call."""

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Fields):
    """A tool that the model may call, passed to the chat template."""

    model_config = ConfigDict(extra="allow")

    type: Literal["function"]
    function: Function


class ConversationFields(Fields):
    """A conversation, and how its prompt is written."""

    messages: Annotated[Items[Message], Field(min_length=1)]
    tools: Items[Tool] | None = Field(None, description="Passed through the chat template.")
    documents: Items[dict[str, Any]] | None = Field(
        None, description="Passed through the chat template."
    )
    add_generation_prompt: bool | None = Field(
        None,
        description="Whether the prompt ends with what begins the assistant's answer; it does"
        " unless continue_final_message is set.",
    )
    continue_final_message: bool | None = Field(
        None, description="Go on within the last message instead of beginning one."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Further variables for the chat template."
    )
    reasoning_effort: str | None = Field(None, description="Passed through the chat template.")
    add_special_tokens: bool | None = Field(
        None,
        description="Whether the tokenizer adds special tokens to what the chat template "
        "wrote; it does not.",
    )
    chat_template: None = None


class ChatCompletionRequest(ConversationFields, GenerationFields):
    """The next message of a conversation."""

    max_tokens: Annotated[int, Field(ge=1, lt=2**31), WHOLE] | None = Field(
        None, description="As max_completion_tokens, which goes before it."
    )
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31), WHOLE] | None = Field(
        None, description="Most tokens of an output; without it, up to the model's limit."
    )
    logprobs: bool | None = Field(None, description="Tell log-probabilities of each token.")
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = Field(
        None, description="With logprobs: and of so many likeliest ones."
    )
    tool_choice: Literal["none", "auto"] | None = Field(
        None, description="none hides tools from the chat template."
    )
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    modalities: Items[Literal["text"]] | None = None
    audio: None = None


class TokenizeRequest(Fields):
    """A text or a conversation whose tokens are wanted."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChatRequest(ConversationFields):
    """A conversation whose tokens are wanted."""

    model: str | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Fields):
    """Tokens whose text is wanted."""

    model: str | None = None
    tokens: Items[TokenId]
