"""The options of `autotune run` that tune an engine which is not ours.

    @with_external()
    def run(..., *, external: dict[str, Any] | None) -> None: ...

`external` is None unless --engine or --url is given. Stacks with `with_knobs` and `with_traffic`.
"""

from __future__ import annotations

import functools
import inspect
import shlex
from collections.abc import Callable
from typing import Annotated, Any

import typer

from autotune.cli.durations import parse_duration
from autotune.errors import BadInput

_PANEL = "Another engine"

_EngineOption = Annotated[
    str | None,
    typer.Option(
        "--engine",
        help="Tune the flags of vllm, sglang or llamacpp in place of the bundled engine: it is "
        "started with those of each trial and measured over HTTP. Knob options and --search then "
        "mean the engine's own.",
        rich_help_panel=_PANEL,
    ),
]
_PathOption = Annotated[
    str | None,
    typer.Option(
        "--engine-path",
        help="The engine's program, or the Python that has it installed.",
        rich_help_panel=_PANEL,
    ),
]
_ArgumentsOption = Annotated[
    str | None,
    typer.Option(
        "--engine-args",
        help="Arguments for every start of it, in one text: '--trust-remote-code'.",
        rich_help_panel=_PANEL,
    ),
]
_UrlOption = Annotated[
    str | None,
    typer.Option(
        "--url",
        help="A server that --restart-command restarts, here or elsewhere; needs --engine for the "
        "names of its flags.",
        rich_help_panel=_PANEL,
    ),
]
_RestartOption = Annotated[
    str | None,
    typer.Option(
        "--restart-command",
        help="Restarts the server at --url with the flags of a trial, put in for {flags}.",
        rich_help_panel=_PANEL,
    ),
]
_NameOption = Annotated[
    str | None,
    typer.Option(
        "--served-model-name", help="The model's name in requests.", rich_help_panel=_PANEL
    ),
]
_KeyOption = Annotated[
    str | None,
    typer.Option(
        "--api-key-env",
        help="Environment variable with the server's API key.",
        rich_help_panel=_PANEL,
    ),
]
_StartOption = Annotated[
    str | None,
    typer.Option(
        "--start-limit",
        help="How long a start may take, for instance 5m. Default: the engine's table's.",
        rich_help_panel=_PANEL,
    ),
]
_LossyOption = Annotated[
    bool,
    typer.Option(
        "--lossy/--no-lossy",
        help="Search knobs too that may change what is generated, as the cache's type.",
        rich_help_panel=_PANEL,
    ),
]
_ShortOption = Annotated[
    float,
    typer.Option(
        "--short-load",
        help="Share of a window that a trial is offered first; the rest is spared where that is "
        "hopeless. 0 offers all.",
        rich_help_panel=_PANEL,
    ),
]

# Parameter, its annotation and its default.
_OPTIONS: tuple[tuple[str, Any, Any], ...] = (
    ("engine", _EngineOption, None),
    ("engine_path", _PathOption, None),
    ("engine_args", _ArgumentsOption, None),
    ("url", _UrlOption, None),
    ("restart_command", _RestartOption, None),
    ("served_model_name", _NameOption, None),
    ("api_key_env", _KeyOption, None),
    ("start_limit", _StartOption, None),
    ("lossy", _LossyOption, False),
    ("short_load", _ShortOption, 0.25),
)
EXTERNAL_PARAMETERS = tuple(name for name, _, _ in _OPTIONS)


def with_external() -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a Typer command those options, collected into its parameter `external`.

    Raises:
        TypeError: the command has no keyword parameter `external` to receive them.
    """
    added = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
        )
        for name, annotation, default in _OPTIONS
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        if "external" not in signature.parameters:
            raise TypeError(f"{command.__name__} needs a parameter `external` to receive them")

        @functools.wraps(command)
        def run(**given: Any) -> None:
            options = {name: given.pop(name) for name in EXTERNAL_PARAMETERS}
            command(**given, external=external_options(options))

        own = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in signature.parameters.items()
            if name != "external"
        ]
        # Typer reads the annotations beside the signature; both must tell the same.
        run.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in [*own, *added]} | {"return": None}
        return run

    return decorate


def external_options(given: dict[str, Any]) -> dict[str, Any] | None:
    """By the names of `ExternalOptions`; None where the bundled engine is meant.

    Raises:
        BadInput: an option without the engine that it is of, or one that cannot be read.
    """
    if given["engine"] is None:
        alone = [name for name, _, default in _OPTIONS if given[name] != default]
        if alone:
            flag = "--" + alone[0].replace("_", "-")
            raise BadInput(
                f"{flag} is of a search over another engine: say which with --engine, for instance "
                "--engine vllm"
            )
        return None
    limit = given["start_limit"]
    return {
        "engine": given["engine"],
        "engine_path": given["engine_path"],
        "engine_arguments": _words(given["engine_args"], "--engine-args"),
        "url": given["url"],
        "restart_command": _words(given["restart_command"], "--restart-command"),
        "served_name": given["served_model_name"],
        "api_key_env": given["api_key_env"],
        "start_limit_s": None if limit is None else parse_duration(limit, "--start-limit"),
        "lossy": given["lossy"],
        "short_share": given["short_load"],
    }


def _words(text: str | None, flag: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text or ""))
    except ValueError as error:
        raise BadInput(f"{flag} {text!r} cannot be split into words: {error}") from None
