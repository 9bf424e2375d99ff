"""From a configuration of the bundled engine to another engine's keys; nothing is lost silently."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autotune.conditional_knobs import idle_because
from autotune.deploy.serving_engine import KnobMapping, ServingEngine
from engine.config import KNOBS, EngineConfig


@dataclass(frozen=True, slots=True)
class Entry:
    """One key of the other engine's file, the knob it came from, and what to know of it.

    With `member`, the value is that member of the key's JSON, to which other knobs may add.
    """

    knob: str
    key: str
    value: Any
    notes: tuple[str, ...] = ()
    member: str | None = None


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A knob that has no key: `reason` says why, or what to do instead."""

    knob: str
    value: Any
    reason: str


@dataclass(frozen=True, slots=True)
class Translation:
    """Every knob that has a value is in exactly one of the three.

    `lost` did shape what was measured and does not carry over; `unneeded` needs no key there.
    """

    entries: tuple[Entry, ...]
    lost: tuple[LeftOut, ...]
    unneeded: tuple[LeftOut, ...]

    def settings(self) -> dict[str, Any]:
        """The other engine's keys with their values; members of a key joined into its JSON."""
        values: dict[str, Any] = {}
        for entry in self.entries:
            if entry.member is None:
                values[entry.key] = entry.value
            else:
                values.setdefault(entry.key, {})[entry.member] = entry.value
        return {k: json.dumps(v) if isinstance(v, dict) else v for k, v in values.items()}


@dataclass(slots=True)
class _Placed:
    entries: list[Entry]
    lost: list[LeftOut]
    unneeded: list[LeftOut]


def translate(
    config: EngineConfig,
    engine: ServingEngine,
    device: str,
    measured: Mapping[str, Any] | None = None,
) -> Translation:
    """Spell a configuration in another engine's keys.

    Arguments:
        config: what was measured.
        engine: the other engine's table.
        device: `cpu` or `cuda`, on which it was measured.
        measured: what unset knobs came to on the machine, by name (`kv_cache_memory_bytes` and
            `max_model_len`), as far as it is known.
    """
    values = config.to_dict()
    known = {**(measured or {}), **{k: v for k, v in values.items() if v is not None}}
    placed = _Placed([], [], [])
    for name, value in values.items():
        mapping = engine.knobs.get(name)
        if value is None and mapping is not None and device in mapping.measured_on:
            value = known.get(name)
        if value is None:
            continue
        if mapping is None:
            reason = f"the table of {engine.title} does not know this knob"
            placed.lost.append(LeftOut(name, value, reason))
        elif device not in KNOBS[name].devices:
            reason = f"has no effect on the {device.upper()}, where this was measured"
            placed.unneeded.append(LeftOut(name, value, reason))
        elif (idle := idle_because(name, values)) is not None:
            placed.unneeded.append(LeftOut(name, value, idle))
        elif mapping.overridden_by is not None and values[mapping.overridden_by] is not None:
            reason = f"{mapping.overridden_by} is set and takes its place"
            placed.unneeded.append(LeftOut(name, value, reason))
        else:
            _place(placed, name, value, mapping, device, known, unset=values[name] is None)
    return Translation(tuple(placed.entries), tuple(placed.lost), tuple(placed.unneeded))


def _place(
    placed: _Placed,
    name: str,
    value: Any,
    mapping: KnobMapping,
    device: str,
    known: Mapping[str, Any],
    *,
    unset: bool,
) -> None:
    beside = mapping.only_with
    if beside is not None and known.get(beside.knob) not in beside.among:
        placed.lost.append(LeftOut(name, value, beside.otherwise))
        return
    rule = next((rule for rule in mapping.rules if rule.holds(value, device)), None)
    lost = rule.lost if rule else mapping.lost
    unneeded = rule.unneeded if rule else mapping.unneeded
    if lost is not None:
        placed.lost.append(LeftOut(name, value, lost.format(value=value)))
        return
    if unneeded is not None:
        placed.unneeded.append(LeftOut(name, value, unneeded.format(value=value)))
        return
    assert mapping.key is not None
    notes = [mapping.note] if mapping.note else []
    written = value
    if unset:
        notes.append("left to the engine when measured; this is what it came to")
    if rule is not None:
        written = rule.use
        changed = f"measured with {value}" if written != value else ""
        notes.append(": ".join(filter(None, (changed, rule.note))))
    if mapping.plus is not None:
        written += known.get(mapping.plus, 0)
        notes.append(f"{name}={value}")
    bound = known.get(mapping.at_most) if mapping.at_most is not None else None
    if bound is not None and written > bound:
        notes.append(f"measured with {value}, more than {mapping.at_most} allows there")
        written = bound
    key = mapping.key
    if written is False and mapping.negated_key is not None:
        key, written = mapping.negated_key, True
    told = tuple(note for note in notes if note)
    placed.entries.append(Entry(name, key, written, told, mapping.member))
