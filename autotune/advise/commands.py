"""What to type to try a piece of advice."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from autotune.advise.facts import Facts
from engine.config import KNOBS


def commands_for(
    knobs: Mapping[str, Any],
    facts: Facts,
    *,
    testable: bool,
    workload: Sequence[str] = (),
) -> tuple[str, ...]:
    """Shell commands that try a technique: measure it alone, then search around it.

    `workload` are options of the traffic, as they were given; other knobs are those of the profile.
    What cannot be tried here has none.
    """
    if not testable:
        return ()
    config = facts.profile.engine_config or {}
    model = config.get("model")
    common = [*(["--model", str(model)] if model else []), *workload]
    for name, value in config.items():
        given = name in KNOBS and name not in _NOT_REPEATED and value != KNOBS[name].default
        if given and name not in knobs and value is not None:
            common += _flag(name, value)
    if facts.slo.limits:
        common += ["--slo", str(facts.slo)]
    flags = [part for name, value in knobs.items() for part in _flag(name, value)]
    # A search compares a value with the present one; alone it would be no search.
    searched = [
        part
        for name, value in knobs.items()
        if KNOBS[name].tunable and facts.get(f"config.{name}") is not None
        for part in ("--search", f"{name}={_values(facts, name, value)}")
    ]
    commands = [shlex.join(["autotune", "bench", *common, *flags])]
    if searched:
        commands.append(shlex.join(["autotune", "run", *common, *searched]))
    return tuple(commands)


# Knobs of the profile that the commands name otherwise, or that follow from the machine or the run.
_NOT_REPEATED = ("model", "device", "seed", "calibration")
# Options of the traffic, as `autotune.cli.traffic_options` has them; all but the last take a value.
_TRAFFIC = (
    "--workload",
    "--workload-format",
    "--rate",
    "--load",
    "--scale-lengths",
    "--duration",
    "--start",
    "--requests",
    "--burstiness",
    "--keep-grid",
)


def traffic_arguments(command: Sequence[str]) -> tuple[str, ...]:
    """Those of a command's arguments that say which traffic it offered."""
    found: list[str] = []
    arguments = iter(command)
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if name not in _TRAFFIC:
            continue
        found.append(argument)
        if not equals and name != "--keep-grid":
            found.extend([value] if (value := next(arguments, None)) is not None else [])
    return tuple(found)


def _flag(name: str, value: Any) -> list[str]:
    flag = KNOBS[name].flag
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    return [flag, str(value)]


def _values(facts: Facts, name: str, value: Any) -> str:
    now = facts.get(f"config.{name}")
    return ",".join(_plain(v) for v in dict.fromkeys((now, value)) if v is not None)


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
