"""From a request's fields to `SamplingParams`, within the model's limits; the server's own
are the engine's to keep."""

from __future__ import annotations

from dataclasses import replace

from engine.errors import ConfigError
from engine.request import SamplingParams
from engine.server.errors import ApiError
from engine.server.request_fields import INT64, GenerationFields
from engine.server.served_model import ServedModel

_TOO_LONG = "context_length_exceeded"


def check_prompt(num_tokens: int, model: ServedModel) -> None:
    """See to it that a prompt of so many tokens can be served.

    Raises:
        ApiError: 400, it cannot.
    """
    if num_tokens == 0:
        raise ApiError(400, "the prompt is empty: give at least one token", code="empty_prompt")
    if num_tokens >= model.max_model_len:
        raise ApiError(
            400,
            f"the prompt has {num_tokens} tokens, and prompt and output together may have "
            f"{model.max_model_len}: shorten the prompt or set truncate_prompt_tokens",
            code=_TOO_LONG,
        )


def check_output(asked: int | None, num_prompt_tokens: int, model: ServedModel) -> None:
    """See to it that an output may have so many tokens; None goes as far as there is room.

    Raises:
        ApiError: 400, it may not.
    """
    if asked is not None and num_prompt_tokens + asked > model.max_model_len:
        raise ApiError(
            400,
            f"{num_prompt_tokens} tokens of prompt and max_tokens={asked} are more than the "
            f"{model.max_model_len} tokens that this model takes together: shorten the prompt or "
            "lower max_tokens",
            param="max_tokens",
            code=_TOO_LONG,
        )


def sampling_of(
    body: GenerationFields,
    model: ServedModel,
    *,
    num_prompt_tokens: int,
    max_tokens: int | None,
    logprobs: int | None,
) -> SamplingParams:
    """How a request's outputs are to be generated; what it leaves out is as the model's folder or
    `SamplingParams` say.

    Raises:
        ApiError: 400, something cannot be served.
    """
    check_output(max_tokens, num_prompt_tokens, model)
    beyond = next((i for i in body.stop_token_ids or () if i >= model.vocab_size), None)
    if beyond is not None:
        raise ApiError(
            400,
            f"stop_token_ids holds {beyond}, and this model's token ids are below "
            f"{model.vocab_size}",
            param="stop_token_ids",
            code="invalid_value",
        )
    if max_tokens is not None and (body.min_tokens or 0) > max_tokens:
        raise ApiError(
            400,
            f"min_tokens={body.min_tokens} is above max_tokens={max_tokens}",
            param="min_tokens",
            code="invalid_combination",
        )
    if body.stops:
        model.needs_tokenizer()
    asked = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "ignore_eos": body.ignore_eos,
        "min_tokens": body.min_tokens,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    try:
        return SamplingParams(
            **{**model.default_sampling, **given},  # type: ignore[arg-type]
            max_tokens=max_tokens,
            seed=body.seed,
            stop=body.stops,
            stop_token_ids=tuple(body.stop_token_ids or ()),
            logprobs=logprobs,
        )
    except ConfigError as error:
        raise ApiError(400, str(error), code="invalid_value") from error


def sampling_of_choice(sampling: SamplingParams, choice: int) -> SamplingParams:
    """The sampling of one of `n` outputs: each has a seed of its own, as in vLLM."""
    if sampling.seed is None or choice == 0:
        return sampling
    return replace(sampling, seed=(sampling.seed + choice + INT64) % (2 * INT64) - INT64)
