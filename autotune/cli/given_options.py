"""Which options were typed, so that those without effect can be refused."""

from __future__ import annotations

from collections.abc import Mapping

import typer

from autotune.errors import BadInput


def given_options(context: typer.Context) -> dict[str, str]:
    """The options that were typed: their longest spelling by parameter."""
    return {
        str(parameter.name): max(parameter.opts, key=len)
        for parameter in context.command.params
        if _on_command_line(context, str(parameter.name))
    }


def refuse_useless(useless: Mapping[str, str], beside: str) -> None:
    """Refuse options that have no effect beside something.

    Raises:
        BadInput: there are some; names them.
    """
    if useless:
        flags = ", ".join(dict.fromkeys(useless.values()))
        verb = "has" if len(set(useless.values())) == 1 else "have"
        raise BadInput(f"{flags} {verb} no effect with {beside}")


def _on_command_line(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
