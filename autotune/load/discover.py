"""What a server is asked before a load: which model it has, and what it understands."""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from autotune.embedded import HELD_OUT
from autotune.errors import AutotuneError, BadInput, EnvironmentMissing
from autotune.load.answer import error_message, read_answer
from autotune.load.ask import ask, ask_json, content_of
from autotune.load.endpoint import (
    EXTENSIONS,
    Endpoint,
    Extension,
    PromptForm,
    check_key,
    server_url,
)
from autotune.load.http_connection import Exchange
from autotune.load.open_loop import GREEDY
from autotune.load.received import for_people
from autotune.workload.materialise import LoadRequest
from engine.errors import EngineError
from engine.tokenizer import Tokenizer, has_tokenizer, load_tokenizer

_ASK_S = 15.0
# A server that compiles at its first request takes long to answer it.
_FIRST_ANSWER_S = 300.0
# What is left out, one after the other, for servers that refuse what they do not know.
_LADDER: tuple[frozenset[Extension], ...] = (
    EXTENSIONS,
    EXTENSIONS - {"token_ids", "cache_salt", "repetition_penalty"},
    frozenset(("usage", "ignore_eos")),
    frozenset(("ignore_eos",)),
    frozenset(("usage",)),
    frozenset(),
)
_UNKNOWN_FIELD = (400, 422)
# Bytes of text whose tokens serve as the vocabulary where there is no tokenizer.
_SAMPLE_BYTES = 30_000
# No tokenizer has more tokens; all smaller ids are looked at later.
_LARGEST_VOCABULARY = 1 << 24


@dataclass(frozen=True, slots=True)
class Server:
    """A server that can be loaded.

    `vocabulary` are the ids that prompts may be made of, in order; `max_model_len` in tokens, None
    where the server does not tell it; `software` is what it calls itself. `notes` say what was
    found out for a reader of the figures.
    """

    endpoint: Endpoint
    vocabulary: tuple[int, ...]
    tokenizer: Tokenizer | None = None
    max_model_len: int | None = None
    software: str | None = None
    notes: list[str] = field(default_factory=list)


def discover(
    url: str,
    *,
    model: str | None = None,
    api_key: str | None = None,
    prompts: PromptForm | None = None,
    tokenizer: Tokenizer | None = None,
    say: Callable[[str], None] = lambda _: None,
    stop: threading.Event | None = None,
) -> Server:
    """Ask a server what it serves, and find by short requests how to talk to it.

    Args:
        url: its address, with or without /v1.
        model: the name of the model; needed where the server has several.
        api_key: sent as a bearer token.
        prompts: what to send; None sends token ids where the server takes them, texts elsewhere.
        tokenizer: the model's; without one it is looked for where a server on this machine says
            that its model lies, and the server's /tokenize is asked.
        say: told what is going on.
        stop: set it to give up.

    Raises:
        BadInput: no address, a key that is not accepted, a model that is not there, or no server
            of OpenAI's protocol.
        EnvironmentMissing: nobody answers, or the server is broken.
        Interrupted: `stop` was set.
    """
    base = server_url(url)
    check_key(api_key)
    say("asking the server what it serves")
    entry = _model_entry(base, model, api_key, stop)
    endpoint = Endpoint(base, str(entry["id"]), api_key, tokenizer=tokenizer)
    notes: list[str] = []
    if tokenizer is None:
        tokenizer, note = _tokenizer_nearby(base, entry)
        notes += note
        endpoint = dataclasses.replace(endpoint, tokenizer=tokenizer)
    vocabulary = _vocabulary(endpoint, tokenizer, stop)
    say("asking the server for a first answer")
    endpoint, note = _agreed(endpoint, prompts, vocabulary, stop)
    owner = entry.get("owned_by")
    return Server(
        endpoint,
        vocabulary,
        tokenizer,
        _context_length(entry),
        owner if isinstance(owner, str) else None,
        notes + note,
    )


def answers(url: str, api_key: str | None = None) -> bool:
    """Whether the server still tells what it serves."""
    exchange, _ = ask_json(url, "/v1/models", api_key=api_key, limit_s=_ASK_S)
    return exchange.status == 200


def _model_entry(
    url: str, wanted: str | None, api_key: str | None, stop: threading.Event | None
) -> dict[str, Any]:
    """What the server says of the model."""
    where = f"{url}/v1/models"
    exchange, found = ask_json(url, "/v1/models", api_key=api_key, limit_s=_ASK_S, stop=stop)
    if exchange.error is not None or exchange.status is None:
        raise EnvironmentMissing(f"{url} cannot be reached: {exchange.error}")
    if exchange.status == 404:
        raise BadInput(
            f"{where} is not there (HTTP error 404): {url} is no server of OpenAI's protocol, or "
            "has another path before its /v1"
        )
    if exchange.status != 200:
        raise _refusal(where, exchange)
    entries = found.get("data") if isinstance(found, dict) else None
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("id"), str) for entry in entries
    ):
        raise BadInput(
            f"{where} does not answer with a list of models: {url} is no server of OpenAI's "
            "protocol"
        )
    if not entries:
        raise EnvironmentMissing(f"{url} serves no model")
    names = [entry["id"] for entry in entries]
    if wanted is None:
        # Several names of one model, as far as the server tells.
        roots = {str(entry.get("root") or entry["id"]) for entry in entries}
        if len(roots) > 1:
            raise BadInput(
                f"{url} serves several models: choose one with --served-model: {_listed(names)}"
            )
        return dict(entries[0])
    for entry in entries:
        if entry["id"] == wanted:
            return dict(entry)
    raise BadInput(f"{url} serves no model {wanted!r}; it has {_listed(names)}")


def _tokenizer_nearby(url: str, entry: dict[str, Any]) -> tuple[Tokenizer | None, list[str]]:
    """The tokenizer in the folder that a server on this machine names as its model's."""
    if not _is_local(url):
        return None, []
    for name in (entry.get("root"), entry["id"]):
        # What the server names may be anything; its /tokenize is asked then.
        with contextlib.suppress(EngineError, OSError, ValueError):
            if isinstance(name, str) and Path(name).is_absolute() and has_tokenizer(name):
                note = f"the tokenizer is that of {name}, which the server names"
                return load_tokenizer(name), [note]
    return None, []


def _is_local(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _vocabulary(
    endpoint: Endpoint, tokenizer: Tokenizer | None, stop: threading.Event | None
) -> tuple[int, ...]:
    if tokenizer is not None:
        size = tokenizer.vocab_size
        return tuple(i for i in range(size) if not tokenizer.is_special(i))
    text = HELD_OUT.read_bytes()[:_SAMPLE_BYTES].decode("utf-8", "ignore")
    # vLLM's form, and llama.cpp's.
    for body in ({"model": endpoint.model, "prompt": text}, {"content": text}):
        _, found = ask_json(
            endpoint.url,
            "/tokenize",
            api_key=endpoint.api_key,
            body=body,
            limit_s=_ASK_S,
            stop=stop,
        )
        tokens = found.get("tokens") if isinstance(found, dict) else None
        if (
            isinstance(tokens, list)
            and tokens
            and all(type(i) is int and 0 <= i < _LARGEST_VOCABULARY for i in tokens)
        ):
            # The first may be the one that begins every prompt.
            return tuple(sorted(set(tokens[1:]) or set(tokens)))
    raise BadInput(
        f"{endpoint.url} does not tell the tokens of a text: give --tokenizer FOLDER, the folder "
        "of the model's tokenizer.json"
    )


def _agreed(
    endpoint: Endpoint,
    prompts: PromptForm | None,
    vocabulary: tuple[int, ...],
    stop: threading.Event | None,
) -> tuple[Endpoint, list[str]]:
    """The endpoint with what the server understands, found by asking for two tokens."""
    forms: list[PromptForm] = [prompts] if prompts is not None else ["token_ids", "text"]
    if endpoint.tokenizer is None and prompts is None:
        forms = ["token_ids"]
    probe = LoadRequest("probe", 0.0, tuple(vocabulary[:4]), 2)
    problem: AutotuneError | None = None
    for form in forms:
        for extensions in _LADDER:
            tried = dataclasses.replace(endpoint, prompts=form, extensions=extensions)
            tried_salted = tried.with_salt("probe")
            message = tried_salted.message(tried_salted.body(probe, GREEDY))
            exchange = ask(tried.url, message, _FIRST_ANSWER_S, stop)
            if exchange.status == 200:
                answer = read_answer(exchange, endpoint.tokenizer)
                if answer.outcome == "finished":
                    return tried, _form_note(form, prompts)
                raise BadInput(
                    f"{endpoint.url}{tried.path} does not complete a prompt: {answer.reason}"
                )
            problem = problem or _refusal(f"{endpoint.url}{tried.path}", exchange)
            if exchange.status not in _UNKNOWN_FIELD:
                raise problem
    assert problem is not None
    raise problem


def _form_note(form: PromptForm, asked: PromptForm | None) -> list[str]:
    if asked is None and form == "text":
        return [
            "the server takes no token ids: prompts are sent as texts, whose tokens may differ a "
            "little in number"
        ]
    return []


def _refusal(where: str, exchange: Exchange) -> AutotuneError:
    """The error for an answer that is not 200."""
    status = exchange.status
    if status is None:
        return EnvironmentMissing(f"{where} does not answer: {exchange.error}")
    said = error_message(content_of(exchange))
    said = f": {said}" if said else ""
    if status in (401, 403):
        return BadInput(
            f"{where} answers with the HTTP error {status}{said}; put the server's key into an "
            "environment variable and name it with --api-key-env"
        )
    if 300 <= status < 400:
        to = for_people(exchange.headers.get("location", "another address"))
        return BadInput(f"{where} sends to {to}: give the address of that server if it is meant")
    if status == 429 or status >= 500:
        return EnvironmentMissing(f"{where} answers with the HTTP error {status}{said}")
    return BadInput(f"{where} answers with the HTTP error {status}{said}")


def _context_length(entry: dict[str, Any]) -> int | None:
    """Most tokens of a prompt and its answer: vLLM's and SGLang's field, or llama.cpp's."""
    meta = entry.get("meta")
    for value in (
        entry.get("max_model_len"),
        meta.get("n_ctx") if isinstance(meta, dict) else None,
        meta.get("n_ctx_train") if isinstance(meta, dict) else None,
    ):
        if isinstance(value, int) and value > 1:
            return value
    return None


def _listed(names: list[str], most: int = 5) -> str:
    shown = ", ".join(map(for_people, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
