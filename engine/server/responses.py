"""The bodies of answers, for the description of the API; answers are written without them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

FinishReason = Literal["stop", "length"]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorObject(_Answer):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(_Answer):
    """An answer other than the one asked for."""

    error: ErrorObject


class PromptTokensDetails(_Answer):
    """Of the prompt's tokens, those found in the prefix cache."""

    cached_tokens: int


class UsageObject(_Answer):
    """Tokens that a request cost."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobsObject(_Answer):
    """Log-probabilities, one of each list a token."""

    text_offset: list[int]
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]]


class CompletionChoice(_Answer):
    """One output; token ids are there if they were asked for."""

    index: int
    text: str
    logprobs: CompletionLogprobsObject | None
    finish_reason: FinishReason
    token_ids: list[int] = []
    prompt_token_ids: list[int] = []


class Completion(_Answer):
    """Outputs of prompts; output i of n of prompt p has the index p * n + i."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageObject


class TopLogprob(_Answer):
    """A likely token."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token, and the likeliest ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Answer):
    """Log-probabilities of a message's tokens."""

    content: list[TokenLogprob]
    refusal: None


class AnswerMessage(_Answer):
    """What the model says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Answer):
    """One output; token ids are there if they were asked for."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    token_ids: list[int] = []


class ChatCompletion(_Answer):
    """Next messages of a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageObject
    prompt_token_ids: list[int] = []


class CompletionChunkChoice(_Answer):
    """What an output grew by; `finish_reason` comes with the last of it."""

    index: int
    text: str
    logprobs: CompletionLogprobsObject | None
    finish_reason: FinishReason | None
    token_ids: list[int] = []
    prompt_token_ids: list[int] = []


class CompletionChunk(_Answer):
    """A part of a stream of /v1/completions; the last one may have usage and no choices."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChunkChoice]
    usage: UsageObject | None = None


class Delta(_Answer):
    """What a message grew by; its role comes first."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChunkChoice(_Answer):
    """What an output grew by; `finish_reason` comes with the last of it."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    token_ids: list[int] = []


class ChatCompletionChunk(_Answer):
    """A part of a stream of /v1/chat/completions; the last one may have usage and no choices."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: UsageObject | None = None
    prompt_token_ids: list[int] = []


class ModelObject(_Answer):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class ModelList(_Answer):
    """The models that are served."""

    object: Literal["list"]
    data: list[ModelObject]


class Tokens(_Answer):
    """Tokens of a text; their spellings are there if they were asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizedText(_Answer):
    """The text of tokens."""

    prompt: str
