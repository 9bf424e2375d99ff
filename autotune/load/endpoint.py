"""A server that speaks OpenAI's protocol: where it is, and what it is asked."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit, urlunsplit

from autotune.errors import BadInput
from autotune.workload.materialise import LoadRequest
from engine.request import SamplingParams

PromptForm = Literal["token_ids", "text", "chat"]
# What OpenAI's protocol lacks and most servers have, `usage` tells an answer's tokens
# at its end, `continuous_usage` with every chunk, `token_ids` the tokens themselves; `cache_salt`
# keeps prompts of an earlier load from being found in the prefix cache, and `repetition_penalty`
# is sent even if it is none, as models may have one by default.
Extension = Literal[
    "usage", "ignore_eos", "continuous_usage", "cache_salt", "token_ids", "repetition_penalty"
]
EXTENSIONS: frozenset[Extension] = frozenset(
    (
        "usage",
        "ignore_eos",
        "continuous_usage",
        "cache_salt",
        "token_ids",
        "repetition_penalty",
    )
)
_PATHS = {
    "token_ids": "/v1/completions",
    "text": "/v1/completions",
    "chat": "/v1/chat/completions",
}
_KNOWN_ENDS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/v1")


class Decoder(Protocol):
    """Turns token ids into text and counts texts; `engine.tokenizer.Tokenizer` is one."""

    def encode(self, text: str) -> Sequence[int]:
        """Token ids of a text."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids."""
        ...


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server and how to talk to it.

    Args:
        url: its address as `server_url` gives it, without /v1.
        model: the name by which it serves the model.
        api_key: sent as a bearer token; never shown.
        prompts: what is sent: token ids, their text, or their text as a user's message.
        extensions: what it understands beyond OpenAI's protocol (`discover` finds out).
        tokenizer: the model's; needed for `text` and `chat`, counts tokens where nothing else does.
        cache_salt: sent with every request where `cache_salt` is understood.
    """

    url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    prompts: PromptForm = "token_ids"
    extensions: frozenset[Extension] = EXTENSIONS
    tokenizer: Decoder | None = None
    cache_salt: str | None = None

    @property
    def path(self) -> str:
        """The path that requests go to."""
        return f"{urlsplit(self.url).path}{_PATHS[self.prompts]}"

    def with_salt(self, salt: str) -> Endpoint:
        """The same endpoint, its prompts apart from those of every other salt."""
        return dataclasses.replace(self, cache_salt=salt)

    def body(self, request: LoadRequest, sampling: SamplingParams) -> dict[str, Any]:
        """The JSON of a request; its length is forced where the server lets it be.

        Raises:
            BadInput: texts are to be sent and there is no tokenizer.
        """
        body: dict[str, Any] = {
            "model": self.model,
            **self._prompt(request),
            "max_tokens": request.output_tokens,
            "stream": True,
            **_sampling(sampling),
        }
        options = {
            name: True
            for name, extension in (
                ("include_usage", "usage"),
                ("continuous_usage_stats", "continuous_usage"),
            )
            if extension in self.extensions
        }
        if options:
            body["stream_options"] = options
        if "ignore_eos" in self.extensions:
            body["ignore_eos"] = True
        if "token_ids" in self.extensions:
            body["return_token_ids"] = True
        if "repetition_penalty" in self.extensions:
            body["repetition_penalty"] = sampling.repetition_penalty
        if "cache_salt" in self.extensions and self.cache_salt:
            body["cache_salt"] = self.cache_salt
        return body

    def message(self, body: Mapping[str, Any]) -> bytes:
        """The whole HTTP request for a body."""
        return http_message(self.url, self.path, api_key=self.api_key, body=body)

    def _prompt(self, request: LoadRequest) -> dict[str, Any]:
        if self.prompts == "token_ids":
            return {"prompt": request.token_ids}
        if self.tokenizer is None:
            raise BadInput(
                "prompts are sent as texts, which needs the model's tokenizer: give --tokenizer"
            )
        text = _text_of(request.token_ids, self.tokenizer)
        if self.prompts == "text":
            return {"prompt": text}
        return {"messages": [{"role": "user", "content": text}]}


def server_url(text: str) -> str:
    """A server's address, from what a user gives: with or without /v1 and what follows it.

    Raises:
        BadInput: it is no http or https address of a server.
    """
    given = text.strip()
    example = "write for instance http://127.0.0.1:8000"
    try:
        parts = urlsplit(given)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise BadInput(f"{text!r} is not the address of a server: {error}") from None
    if parts.scheme not in ("http", "https"):
        raise BadInput(f"{text!r} is not the address of a server: {example}")
    if not host or not parts.netloc.isascii():
        raise BadInput(f"{text!r} names no host: {example}")
    if parts.username is not None or parts.password is not None:
        raise BadInput(
            "an address with a user and password is not accepted, as it would be written to the "
            "records: put a key into an environment variable and name it with --api-key-env"
        )
    if parts.query or parts.fragment or not parts.path.isascii() or " " in parts.path:
        raise BadInput(f"{text!r} has more than a path behind the server's name: {example}")
    path = parts.path.rstrip("/")
    for end in _KNOWN_ENDS:
        if path.endswith(end):
            path = path.removesuffix(end)
            break
    return urlunsplit((parts.scheme, parts.netloc, path, "", ""))


def api_key_of(variable: str | None) -> str | None:
    """The key in an environment variable; None where no variable is named.

    Raises:
        BadInput: the variable is not set, or holds what no header can carry.
    """
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise BadInput(f"the environment variable {variable} of --api-key-env is not set")
    check_key(key)
    return key


def check_key(api_key: str | None) -> None:
    """Refuse a key that no header can carry, without showing it.

    Raises:
        BadInput: it is empty, or has other than printable ASCII characters.
    """
    if api_key is not None and (not api_key.isascii() or not api_key.isprintable() or not api_key):
        raise BadInput("the API key must be printable ASCII characters, without a line's end")


def http_message(
    url: str, path: str, *, api_key: str | None = None, body: Mapping[str, Any] | None = None
) -> bytes:
    """An HTTP request for a path of the server at `url`: GET, or POST where there is a body."""
    head = [
        f"{'GET' if body is None else 'POST'} {path} HTTP/1.1",
        f"Host: {urlsplit(url).netloc}",
        "User-Agent: autotune",
        "Accept: text/event-stream, application/json",
        "Accept-Encoding: identity",
    ]
    if api_key is not None:
        head.append(f"Authorization: Bearer {api_key}")
    content = b""
    if body is not None:
        text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
        content = text.encode("utf-8", "replace")
        head += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
    return "\r\n".join([*head, "", ""]).encode("ascii") + content


def _text_of(token_ids: Sequence[int], tokenizer: Decoder) -> str:
    """A text of at most about so many tokens; ids drawn at random join to others, often to more."""
    text = tokenizer.decode(token_ids)
    again = tokenizer.encode(text)
    return text if len(again) <= len(token_ids) else tokenizer.decode(again[: len(token_ids)])


def _sampling(sampling: SamplingParams) -> dict[str, Any]:
    """The fields of a sampling, without those that change nothing."""
    default = SamplingParams()
    fields: dict[str, Any] = {"temperature": sampling.temperature}
    for name in (
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "seed",
    ):
        value = getattr(sampling, name)
        if value != getattr(default, name):
            fields[name] = value
    return fields
