"""From values of an engine's knobs to what starts it: arguments, variables, request fields."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autotune.external.table import Device, EngineTable, TableKnob, Value


@dataclass(frozen=True, slots=True)
class Flags:
    """How values are given: command-line arguments, variables, and fields of each request."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    request_fields: Mapping[str, Value]


def flags_of(table: EngineTable, values: Mapping[str, Value], device: Device) -> Flags:
    """How the values are given to the engine; what does nothing beside the others is left out."""
    idle = idle_knobs(table, values, device)
    arguments: list[str] = []
    members: dict[str, dict[str, Value]] = {}
    environment: dict[str, str] = {}
    request_fields: dict[str, Value] = {}
    # In the table's order, so that the same values make the same command line.
    for name, knob in table.knobs.items():
        if name not in values or name in idle or values[name] == knob.absent:
            continue
        value = values[name]
        if knob.request_field is not None:
            request_fields[knob.request_field] = value
        if knob.member is not None and knob.flag is not None:
            members.setdefault(knob.flag, {})[knob.member] = value
        elif knob.environment is not None:
            environment[knob.environment] = _text(value)
        else:
            arguments += arguments_of(knob, value)
    for flag, content in members.items():
        arguments += [flag, json.dumps(content, sort_keys=True)]
    return Flags(tuple(arguments), environment, request_fields)


def arguments_of(knob: TableKnob, value: Value) -> list[str]:
    """The words that give a knob its value by its own flag; none where it has no flag for it."""
    if isinstance(value, bool):
        flag = knob.flag if value else knob.negated_flag
        return [] if flag is None else [flag]
    return [] if knob.flag is None else [knob.flag, _text(value)]


def problems_of(table: EngineTable, values: Mapping[str, Value], device: Device) -> list[str]:
    """Why the engine would refuse the values, a sentence each; none: nothing is known against it.

    Unknown knobs, values out of bounds, and broken rules, defaults counted as values.
    """
    sentences = []
    for name, value in values.items():
        knob = table.knobs.get(name)
        if knob is None:
            sentences.append(f"{table.title} has no knob {name!r} in its table")
        elif device not in knob.devices:
            sentences.append(f"{table.title} has {name} only on {' and '.join(knob.devices)}")
        elif problem := knob.problem(value):
            sentences.append(f"{name}: {problem}")
    if sentences:
        return sentences
    idle = idle_knobs(table, values, device)
    known = table.defaults(device) | {n: v for n, v in values.items() if n not in idle}
    for rule in table.rules:
        if rule.broken_by(known):
            names = [name for name in dict.fromkeys(rule.knobs) if name in known]
            told = ", ".join(f"{name}={known[name]}" for name in names)
            sentences.append(f"{rule.why} ({told})")
    return sentences


def idle_knobs(table: EngineTable, values: Mapping[str, Value], device: Device) -> set[str]:
    """Knobs with a value that does nothing beside the values of the others."""
    known = table.defaults(device) | dict(values)
    idle = set()
    for name in values:
        condition = table.knobs[name].only_with if name in table.knobs else None
        if condition is not None and known.get(condition.knob) not in condition.among:
            idle.add(name)
    return idle


def with_length(
    table: EngineTable, values: Mapping[str, Value], tokens: int, device: Device
) -> dict[str, Value]:
    """The values, with room for requests of so many tokens where the user has set none."""
    known = table.defaults(device) | dict(values)
    if table.length.knob in values:
        return dict(values)
    times: Any = 1 if table.length.times is None else known.get(table.length.times, 1)
    return {**values, table.length.knob: tokens * int(times)}


def _text(value: Value) -> str:
    if isinstance(value, bool):
        return "1" if value else "0"
    return f"{value:.12g}" if isinstance(value, float) else str(value)
