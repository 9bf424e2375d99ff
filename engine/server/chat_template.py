"""Chat templates: Jinja programs of a model folder that write a conversation as one text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.checkpoints.gguf.file import GgufFile
from engine.checkpoints.gguf.find import find_gguf
from engine.checkpoints.json_file import read_json_object
from engine.errors import ModelError

# Variables that are not the client's to set.
RESERVED = frozenset(
    {"messages", "tools", "documents", "chat_template", "tokenize", "add_generation_prompt"}
    | {"continue_final_message", "raise_exception", "strftime_now"}
)


class ChatTemplateError(Exception):
    """A conversation cannot be written with the template; the text is the reason."""


class _GenerationBlocks(Extension):
    """`{% generation %}` marks the assistant's words for training; here it means nothing."""

    tags = {"generation"}  # noqa: RUF012 - so declared by Jinja

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The block's content, without the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any
) -> str:
    # Jinja's own escapes what HTML would misread, and a model has never seen that.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _GenerationBlocks],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A compiled template, the one for chats with tools if that differs, and the special tokens
    that templates write, by name (`bos_token`).

    The environment is that of `transformers.apply_chat_template`: blocks take their line's end
    along, loops have `break`, and `raise_exception`, `strftime_now` and a `tojson` that leaves
    HTML's characters alone are there.
    """

    plain: jinja2.Template
    with_tools: jinja2.Template
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def compile(
        cls,
        sources: Mapping[str, str],
        special_tokens: Mapping[str, str],
        where: str | Path,
    ) -> ChatTemplate:
        """Compile templates by name: `default`, and maybe `tool_use`.

        Raises:
            ModelError: one is no Jinja, or there is no default; `where` is for the message.
        """
        environment = _environment()
        source = sources.get("default")
        if source is None:
            raise ModelError(
                f"{where} has chat templates {', '.join(map(repr, sources))} but none named "
                "'default': name a template's file when the server is started"
            )
        try:
            plain = environment.from_string(source)
            tools = sources.get("tool_use")
            with_tools = plain if tools is None else environment.from_string(tools)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ModelError(f"{where}: the chat template is no valid Jinja: {error}") from error
        return cls(plain, with_tools, special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Write a conversation as the model's prompt.

        Args:
            messages: each with `role` and `content`, the latter a text or None.
            tools: functions in OpenAI's form, for the template to describe.
            documents: for templates that ground answers in them.
            add_generation_prompt: end with what begins the assistant's next words.
            continue_final_message: end right after the last message's content.
            variables: further ones for the template; none of `RESERVED`.

        Raises:
            ChatTemplateError: the template refuses the messages, or fails on them.
        """
        given = {
            **self.special_tokens,
            **(variables or {}),
            "messages": list(messages),
            "tools": list(tools) if tools else None,
            "documents": list(documents) if documents else None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = (self.with_tools if tools else self.plain).render(given)
        except Exception as error:  # a template is a program, and may fail in any way
            raise ChatTemplateError(
                f"the chat template cannot write these messages: {error or type(error).__name__}"
            ) from error
        return _cut_after(text, messages) if continue_final_message else text


def _cut_after(text: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """The text up to the last message's content, as transformers cuts it."""
    final = messages[-1].get("content") or ""
    for wanted in (final, final.strip()):
        at = text.rfind(wanted) if wanted else -1
        if at >= 0:
            return text[: at + len(wanted)]
    raise ChatTemplateError(
        "continue_final_message: the chat template does not write the last message's content as "
        "it stands, so there is no place to go on from"
    )


def load_chat_template(model: Path, file: Path | None = None) -> ChatTemplate | None:
    """The chat template of a model folder or GGUF file; `file` goes before it. None: there is none.

    Looked for in `chat_template.jinja`, `chat_template.json` and `tokenizer_config.json`, in the
    order of transformers.

    Raises:
        ModelError: a file is missing or broken.
    """
    folder = model.expanduser()
    gguf = find_gguf(folder)
    if gguf is not None:
        metadata = GgufFile(gguf).metadata
        tokens, found = _gguf_special_tokens(metadata), metadata.get("tokenizer.chat_template")
        where: Path = gguf
    else:
        config = _optional_json(folder / "tokenizer_config.json")
        tokens = _special_tokens(_optional_json(folder / "special_tokens_map.json"), config)
        where, found = folder / "tokenizer_config.json", config.get("chat_template")
        for name in ("chat_template.json", "chat_template.jinja"):
            if (folder / name).is_file():
                where = folder / name
                jinja = where.suffix == ".jinja"
                found = _read(where) if jinja else read_json_object(where).get("chat_template")
    if file is not None:
        where, found = file, _read(file.expanduser())
    if found is None:
        return None
    return ChatTemplate.compile(_named(found, where), tokens, where)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ModelError(f"the chat template {path} cannot be read: {why}") from error


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _named(found: object, where: Path) -> dict[str, str]:
    """Templates by name: a text is the default, a list names each."""
    if isinstance(found, str):
        return {"default": found}
    if isinstance(found, list):
        named = {
            item["name"]: item["template"]
            for item in found
            if isinstance(item, dict)
            and isinstance(item.get("name"), str)
            and isinstance(item.get("template"), str)
        }
        if len(named) == len(found) and named:
            return named
    raise ModelError(
        f"{where}: chat_template must be a Jinja text or a list of names with their templates"
    )


def _special_tokens(*stored: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name; each is stored as a text or as an object with its `content`."""
    tokens = {}
    for values in stored:
        for name, value in values.items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                tokens[name] = text
    return tokens


def _gguf_special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    pieces = metadata.get("tokenizer.ggml.tokens")
    tokens = {}
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding")):
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(pieces, list) and isinstance(number, int) and 0 <= number < len(pieces):
            tokens[name] = str(pieces[number])
    return tokens
