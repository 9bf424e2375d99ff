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

    `workload` are options of the traffic, as they were given. What cannot be tried here has none.
    """
    if not testable:
        return ()
    model = (facts.profile.engine_config or {}).get("model")
    common = [*(["--model", str(model)] if model else []), *workload]
    if facts.slo.limits:
        common += ["--slo", str(facts.slo)]
    flags = [part for name, value in knobs.items() for part in _flag(name, value)]
    searched = [
        part
        for name, value in knobs.items()
        if KNOBS[name].tunable
        for part in ("--search", f"{name}={_values(facts, name, value)}")
    ]
    commands = [shlex.join(["autotune", "bench", *common, *flags])]
    if searched:
        commands.append(shlex.join(["autotune", "run", *common, *searched]))
    return tuple(commands)


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
