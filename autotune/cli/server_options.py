"""Options of commands that load a running server."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autotune.errors import BadInput

if TYPE_CHECKING:
    from autotune.load.endpoint import PromptForm

_PANEL = "Running server"
# Knobs that tell of the server's model; all others are the server's own affair.
_ABOUT_MODEL = ("tokenizer", "model", "max_model_len")


class Send(StrEnum):
    """What is sent as a prompt."""

    IDS = "ids"
    TEXT = "text"
    CHAT = "chat"


UrlOption = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        help="Load this running server of OpenAI's protocol instead of an engine of our own, for "
        "instance http://127.0.0.1:8000.",
        rich_help_panel=_PANEL,
    ),
]
ServedModelOption = Annotated[
    str | None,
    typer.Option(
        "--served-model",
        metavar="NAME",
        help="With --url: the model's name there. Default: the only one that it serves.",
        rich_help_panel=_PANEL,
    ),
]
ApiKeyOption = Annotated[
    str | None,
    typer.Option(
        "--api-key-env",
        metavar="VARIABLE",
        help="With --url: the environment variable that holds the server's API key.",
        rich_help_panel=_PANEL,
    ),
]
SendOption = Annotated[
    Send | None,
    typer.Option(
        "--send",
        help="With --url: send prompts as token ids, as texts, or as a user's message in a chat. "
        "Default: token ids, texts where the server takes none.",
        rich_help_panel=_PANEL,
    ),
]


def prompt_form(send: Send | None) -> PromptForm | None:
    """What the load calls it."""
    if send is None:
        return None
    forms: dict[Send, PromptForm] = {
        Send.IDS: "token_ids",
        Send.TEXT: "text",
        Send.CHAT: "chat",
    }
    return forms[send]


def refuse_contradictions(
    url: str | None, only_with_url: Mapping[str, Any], knobs: Mapping[str, Any]
) -> None:
    """Refuse options that have no effect with a server, or without one.

    Raises:
        BadInput: there are some; names them.
    """
    if url is None:
        given = [flag for flag, value in only_with_url.items() if value is not None]
        if given:
            raise BadInput(f"{', '.join(given)} needs --url, the address of a running server")
        return
    useless = [f"--{name.replace('_', '-')}" for name in knobs if name not in _ABOUT_MODEL]
    if useless:
        raise BadInput(
            f"{', '.join(sorted(useless))} has no effect with --url: the server was configured "
            "when it was started"
        )
