"""From a configuration of the bundled engine to another engine's keys; nothing is lost silently."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autotune.deploy.serving_engine import KnobMapping, ServingEngine
from engine.config import KNOBS, EngineConfig


@dataclass(frozen=True, slots=True)
class Entry:
    """One key of the other engine's file, the knob it came from, and what to know of it."""

    knob: str
    key: str
    value: Any
    notes: tuple[str, ...] = ()


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


@dataclass(slots=True)
class _Draft:
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
    draft = _Draft([], [], [])
    for name, value in values.items():
        mapping = engine.knobs.get(name)
        if value is None and mapping is not None and device in mapping.measured_on:
            value = known.get(name)
        if value is None:
            continue
        if mapping is None:
            reason = f"the table of {engine.title} does not know this knob"
            draft.lost.append(LeftOut(name, value, reason))
        elif device not in KNOBS[name].devices:
            reason = f"has no effect on the {device.upper()}, where this was measured"
            draft.unneeded.append(LeftOut(name, value, reason))
        elif mapping.overridden_by is not None and values[mapping.overridden_by] is not None:
            reason = f"{mapping.overridden_by} is set and takes its place"
            draft.unneeded.append(LeftOut(name, value, reason))
        else:
            _place(draft, name, value, mapping, device, known, unset=values[name] is None)
    return Translation(tuple(draft.entries), tuple(draft.lost), tuple(draft.unneeded))


def _place(
    draft: _Draft,
    name: str,
    value: Any,
    mapping: KnobMapping,
    device: str,
    known: Mapping[str, Any],
    *,
    unset: bool,
) -> None:
    rule = next((rule for rule in mapping.rules if rule.holds(value, device)), None)
    lost = rule.lost if rule else mapping.lost
    unneeded = rule.unneeded if rule else mapping.unneeded
    if lost is not None:
        draft.lost.append(LeftOut(name, value, lost.format(value=value)))
        return
    if unneeded is not None:
        draft.unneeded.append(LeftOut(name, value, unneeded.format(value=value)))
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
    draft.entries.append(Entry(name, key, written, tuple(note for note in notes if note)))
