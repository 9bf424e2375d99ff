"""Command-line options of the engine's knobs, derived from their declarations.

A command takes the knobs by the decorator `with_knobs`:

    @with_knobs()
    def bench(..., *, knobs: dict[str, Any]) -> None:
        config = EngineConfig.from_mapping({**defaults, **knobs})

`knobs` then holds what was set explicitly, in `--config FILE` or by a flag, and nothing else; a
flag wins over the file. Values are checked by `EngineConfig` itself, so that a file, a flag and
the Python API refuse the same things in the same words.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any

import typer

from autotune.deploy.engine_yaml import read_knobs
from autotune.errors import BadInput
from autotune.speculative_models import with_speculative_model
from engine.config import KNOBS, EngineConfig, Knob

KNOB_PANEL = "Engine knobs"

_SIZES = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}


def with_knobs(
    *, without: Collection[str] = (), target: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a Typer command `--config` and one option per knob, collected into `knobs`.

    Arguments:
        without: knobs for which the command has an option of its own, or none.
        target: a parameter of the command that names a file of knobs, a run's folder or a model;
            the command gets None for it.

    Raises:
        TypeError: the command has no keyword parameter `knobs` to receive them.
    """
    offered = [knob for name, knob in KNOBS.items() if name not in without]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        if "knobs" not in signature.parameters:
            raise TypeError(f"{command.__name__} needs a parameter `knobs` to receive the knobs")

        @functools.wraps(command)
        def run(**given: Any) -> None:
            path = given.pop("config")
            flags = {knob.name: given.pop(knob.name) for knob in offered}
            if target is not None:
                path = _resolve_target(given[target], path, flags)
                given[target] = None
            command(**given, knobs=chosen_knobs(path, flags))

        own = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in signature.parameters.items()
            if name != "knobs"
        ]
        added = [_config_parameter(), *map(_knob_parameter, offered)]
        # Typer reads the annotations beside the signature; both must tell the same.
        run.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in [*own, *added]} | {"return": None}
        return run

    return decorate


def chosen_knobs(config: Path | None, flags: dict[str, Any]) -> dict[str, Any]:
    """What was set explicitly: the file's knobs, overridden by the flags that are not None.

    A speculative method gets the model that is known for it, where none is named.

    Raises:
        BadInput: the file cannot be read, or holds an unknown knob or a bad value.
        ConfigError: a flag has a bad value, or the knobs together contradict each other.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    if config is not None:
        return read_knobs(config, given)
    given = with_speculative_model(given)
    EngineConfig.from_mapping(given)
    return given


def _resolve_target(target: str | None, config: Path | None, flags: dict[str, Any]) -> Path | None:
    """The file of knobs that is meant; a target that is a model becomes the flag `model`.

    Raises:
        BadInput: a file or a model is named twice.
    """
    if target is None:
        return config
    path = Path(target).expanduser()
    inside = path / "deploy" / "engine.yaml"
    file = inside if inside.is_file() else path
    if file.suffix in (".yaml", ".yml"):
        if config is not None:
            raise BadInput(f"two files of knobs are named: {target} and --config {config}")
        return file
    if flags.get("model") is not None:
        raise BadInput(f"two models are named: {target} and --model {flags['model']}")
    flags["model"] = target
    return config


def knob_help(knob: Knob) -> str:
    """A knob's help: what it is, on which device, its range and default with their unit."""
    notes = []
    if len(knob.devices) == 1:
        notes.append(f"{knob.devices[0]} only")
    if knob.type is not bool and knob.choices is None:
        notes.append(_range(knob))
    if knob.default not in (None, ""):
        default = str(knob.default).lower() if knob.type is bool else str(knob.default)
        notes.append(f"default {default}")
    notes = [note for note in notes if note]
    return f"{knob.help} ({'; '.join(notes)})" if notes else knob.help


def _range(knob: Knob) -> str:
    unit = f" {knob.unit}" if knob.unit else ""
    if knob.minimum is not None and knob.maximum is not None:
        return f"{knob.minimum} to {knob.maximum}{unit}"
    if knob.minimum is not None:
        return f"at least {knob.minimum}{unit}"
    if knob.maximum is not None:
        return f"at most {knob.maximum}{unit}"
    return knob.unit


def _knob_parameter(knob: Knob) -> inspect.Parameter:
    flag = f"{knob.flag}/--no-{knob.flag[2:]}" if knob.type is bool else knob.flag
    settings: dict[str, Any] = {
        "help": knob_help(knob),
        "rich_help_panel": KNOB_PANEL,
        "show_default": False,
    }
    kind: Any = knob.type
    if knob.choices is not None:
        settings["metavar"] = "|".join(map(str, knob.choices))
    elif knob.unit == "bytes":
        settings |= {"metavar": "BYTES", "parser": parse_bytes}
    return inspect.Parameter(
        knob.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, typer.Option(flag, **settings)],
    )


def _config_parameter() -> inspect.Parameter:
    option = typer.Option(
        "--config",
        help="YAML file of engine knobs, such as deploy/engine.yaml of a run; flags win over it.",
        metavar="FILE",
        rich_help_panel=KNOB_PANEL,
        show_default=False,
    )
    return inspect.Parameter(
        "config",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[Path | None, option],
    )


def parse_bytes(text: str) -> int:
    """Bytes from `4GiB`, `512MB` or a plain number.

    Raises:
        typer.BadParameter: anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    scale = _SIZES.get(found.group(2).upper()) if found else None
    if found is None or scale is None:
        raise typer.BadParameter(f"{text!r} is no number of bytes; write for instance 4GiB")
    return int(float(found.group(1)) * scale)
