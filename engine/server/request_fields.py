"""Fields that completions and chats share, with bounds that the engine is sure to bear."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

INT64 = 2**63
_INT32 = 2**31
MOST_CHOICES = 128  # outputs of one prompt
# Stop texts are looked for after every token, with a table of their beginnings.
_STOP_TEXTS = 16
_STOP_LENGTH = 256


def whole(value: object) -> object:
    """A number without a fraction as an integer, whichever way JSON writes it; others as are."""
    if type(value) is float and value.is_integer():
        return int(value)
    return value


def _only(wanted: bool) -> AfterValidator:
    def check(value: bool) -> bool:
        if value is not wanted:
            raise ValueError(f"must be {str(wanted).lower()}")
        return value

    return AfterValidator(check)


WHOLE = BeforeValidator(whole)  # stands after bounds, so that the schema tells them
# Not a Literal: 0 and 1 would do for it.
Never = Annotated[bool, _only(False), Field(json_schema_extra={"const": False})]
Always = Annotated[bool, _only(True), Field(json_schema_extra={"const": True})]
StopText = Annotated[str, Field(min_length=1, max_length=_STOP_LENGTH)]
TokenId = Annotated[int, Field(ge=0, lt=_INT32), WHOLE]
Item = TypeVar("Item")
# Of a list as long as a body may be, whose items are all wrong, one fault is told, not each.
Items = Annotated[list[Item], Field(fail_fast=True)]

# Fields that other servers have and this one does not: accepted with the values that mean nothing,
# refused with others. What is not listed anywhere is ignored, as other servers do.
REFUSED: dict[str, str] = {
    "best_of": "best_of is not served: ask for n and choose by logprobs",
    "suffix": "suffix is not served: this model writes what follows a prompt, not what stands "
    "between two texts",
    "logit_bias": "logit_bias is not served; leave it out",
    "use_beam_search": "use_beam_search is not served: set temperature to 0 for the likeliest "
    "tokens",
    "response_format": "response_format is served as text alone: outputs are not held to a grammar",
    "structured_outputs": "structured_outputs is not served: outputs are not held to a grammar",
    "guided_json": "guided_json is not served: outputs are not held to a grammar",
    "guided_regex": "guided_regex is not served: outputs are not held to a grammar",
    "guided_choice": "guided_choice is not served: outputs are not held to a grammar",
    "guided_grammar": "guided_grammar is not served: outputs are not held to a grammar",
    "prompt_logprobs": "prompt_logprobs is not served: log-probabilities are of outputs alone",
    "allowed_token_ids": "allowed_token_ids is not served; leave it out",
    "bad_words": "bad_words is not served; leave it out",
    "include_stop_str_in_output": "include_stop_str_in_output is not served: outputs end before "
    "a stop text",
    "skip_special_tokens": "skip_special_tokens is always true here: texts come without special "
    "tokens, and return_token_ids tells them",
    "prompt_embeds": "prompt_embeds is not served: send texts or token ids",
    "tool_choice": "tool_choice is served as auto or none: outputs cannot be forced to call a tool",
    "functions": "functions is not served: send tools",
    "modalities": "modalities is served as text alone",
    "audio": "audio is not served: this model writes text",
    "chat_template": "chat_template is not taken from requests: name its file when the server is "
    "started",
}


class Fields(BaseModel):
    """What a request may hold: types are not converted, and unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(Fields):
    """What a stream tells beside its texts."""

    include_usage: bool | None = Field(
        None, description="End with a chunk that has usage and no choices."
    )
    continuous_usage_stats: bool | None = Field(
        None, description="Tell usage so far in every chunk."
    )


class TextFormat(Fields):
    """The only form of outputs."""

    type: Literal["text"]


class GenerationFields(Fields):
    """How outputs are to be generated; names and meanings are OpenAI's and vLLM's."""

    model: str | None = Field(None, description="The served model's name; none means that one.")
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES), WHOLE] | None = Field(
        None, description="Outputs a prompt."
    )
    temperature: Annotated[float, Field(ge=0, le=100)] | None = Field(
        None, description="0 takes the likeliest token."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=_INT32), WHOLE] | None = Field(
        None, description="0 and -1 keep all tokens."
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1e-6, le=100)] | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64), WHOLE] | None = Field(
        None, description="Makes outputs reproducible; output i of n has seed + i."
    )
    stop: StopText | Annotated[list[StopText], Field(max_length=_STOP_TEXTS)] | None = Field(
        None, description="Texts that end the output, which ends before them."
    )
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] | None = None
    ignore_eos: bool | None = Field(None, description="Go on after the model's end token.")
    min_tokens: Annotated[int, Field(ge=0, lt=_INT32), WHOLE] | None = Field(
        None, description="No end and no stop before so many tokens."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = Field(
        None, description="Tell token ids of the prompt and the output."
    )
    return_tokens_as_token_ids: bool | None = Field(
        None, description="In logprobs, write tokens as token_id:7."
    )
    truncate_prompt_tokens: Annotated[int, Field(ge=1, lt=_INT32), WHOLE] | None = Field(
        None, description="Keep only so many tokens of the prompt's end."
    )
    priority: Annotated[int, Field(ge=-_INT32, lt=_INT32), WHOLE] | None = Field(
        None, description="The lower is served first where scheduling_policy is priority."
    )
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = Field(
        None, description="Cached prompts are shared with requests of the same salt alone."
    )
    use_beam_search: Never | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    response_format: TextFormat | None = None
    structured_outputs: None = None
    guided_json: None = None
    guided_regex: None = None
    guided_choice: None = None
    guided_grammar: None = None
    prompt_logprobs: None = None
    allowed_token_ids: None = None
    bad_words: Annotated[list[Any], Field(max_length=0)] | None = None
    include_stop_str_in_output: Never | None = None
    skip_special_tokens: Always | None = None

    @property
    def num_choices(self) -> int:
        """Outputs a prompt."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an output."""
        stop = self.stop or ()
        return (stop,) if isinstance(stop, str) else tuple(stop)
