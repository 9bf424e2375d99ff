"""From a configuration of the bundled engine to another engine's keys; nothing is lost silently."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from autotune.conditional_knobs import idle_because
from autotune.deploy.conversions import Known, NotConvertible, convert
from autotune.deploy.evidence import spelled
from autotune.deploy.serving_engine import KnobMapping, ServingEngine, ValueRule
from autotune.deploy.translation import Entry, LeftOut, Translation
from engine.config import KNOBS, EngineConfig

__all__ = ["Entry", "LeftOut", "Translation", "translate"]


@dataclass(slots=True)
class _Placed:
    """What has been placed so far; `known` also holds what unset knobs came to."""

    known: Mapping[str, Any]
    device: str
    entries: list[Entry] = field(default_factory=list)
    lost: list[LeftOut] = field(default_factory=list)
    unneeded: list[LeftOut] = field(default_factory=list)

    def facts(self) -> Known:
        return Known(self.known, self.device, frozenset(left.knob for left in self.lost))


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
        measured: what unset knobs came to on the machine, and its memory, as far as it is known;
            see `measured_facts`.
    """
    values = config.to_dict()
    known = {**(measured or {}), **{k: v for k, v in values.items() if v is not None}}
    placed = _Placed(known, device)
    carried: list[tuple[str, Any, str]] = []
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
        elif mapping.carried_by is not None:
            carried.append((name, value, mapping.carried_by))
        else:
            _place(placed, name, value, mapping, unset=values[name] is None)
    for name, value, other in carried:
        _follow(placed, name, value, other, engine.title)
    taken = {key for e in placed.entries for key in (e.key, *e.beside) if e.place == "setting"}
    always = {a.key: (a.value, a.note) for a in engine.always if a.key not in taken}
    return Translation(tuple(placed.entries), tuple(placed.lost), tuple(placed.unneeded), always)


def _follow(placed: _Placed, name: str, value: Any, other: str, title: str) -> None:
    """Place a knob whose meaning another one carries."""
    for place, entry in enumerate(placed.entries):
        if entry.knob == other:
            placed.entries[place] = replace(entry, carries=(*entry.carries, name))
            reason = f"its memory is converted through bytes: see {entry.key}"
            placed.unneeded.append(LeftOut(name, value, reason))
            return
    reason = f"{title} means something else by its share of the memory, so this one is not copied"
    if not any(left.knob == other for left in placed.lost):
        reason += "; the bytes that it came to are not known"
    placed.lost.append(LeftOut(name, value, reason))


def _place(placed: _Placed, name: str, value: Any, mapping: KnobMapping, *, unset: bool) -> None:
    beside = mapping.only_with
    if beside is not None and placed.known.get(beside.knob) not in beside.among:
        placed.lost.append(LeftOut(name, value, beside.otherwise))
        return
    rule = next((rule for rule in mapping.rules if rule.holds(value, placed.device)), None)
    lost = rule.lost if rule else mapping.lost
    unneeded = rule.unneeded if rule else mapping.unneeded
    if lost is not None:
        placed.lost.append(LeftOut(name, value, lost.format(value=value)))
        return
    if unneeded is not None:
        placed.unneeded.append(LeftOut(name, value, unneeded.format(value=value)))
        return
    notes = [mapping.note] if mapping.note else []
    if unset:
        notes.append("left to the engine when measured; this is what it came to")
    try:
        if rule is not None:
            entry = _by_rule(name, value, mapping, rule, notes)
        else:
            entry = _converted(name, value, mapping, placed, notes)
    except NotConvertible as reason:
        placed.lost.append(LeftOut(name, value, str(reason)))
        return
    placed.entries.append(_bounded(entry, value, mapping, placed.known))


def _by_rule(
    name: str, measured: Any, mapping: KnobMapping, rule: ValueRule, notes: list[str]
) -> Entry:
    before, after = spelled(measured), spelled(rule.use)
    changed = f"measured with {before}" if before != after and rule.key is None else ""
    notes.append(": ".join(filter(None, (changed, rule.note))))
    key = rule.key or mapping.key or mapping.env
    assert key is not None, f"a rule of {name} has no key"
    others = {other: (value, "") for other, value in rule.beside.items()}
    return _entry(name, key, rule.use, mapping, notes, others)


def _converted(
    name: str, value: Any, mapping: KnobMapping, placed: _Placed, notes: list[str]
) -> Entry:
    """An entry for each key that the knob is converted to; the first is its own."""
    way: str | Mapping[str, str] | None
    if mapping.key_by is not None:
        other = placed.known.get(mapping.key_by.knob)
        way = mapping.key_by.keys.get(other)
        if way is None:
            raise NotConvertible(f"there is no key for it where {mapping.key_by.knob} is {other}")
        way = {way: "value"} if isinstance(way, str) else way
    elif isinstance(mapping.convert, Mapping):
        way = mapping.convert
    else:
        key = mapping.key or mapping.env
        assert key is not None
        way = {key: mapping.convert or "value"}
    facts = placed.facts()
    made = {key: convert(how, value, facts) for key, how in way.items()}
    (first, own), *others = made.items()
    beside = {key: (converted.value, converted.note) for key, converted in others}
    return _entry(name, first, own.value, mapping, [*notes, own.note], beside)


def _entry(
    name: str,
    key: str,
    value: Any,
    mapping: KnobMapping,
    notes: list[str],
    beside: Mapping[str, tuple[Any, str]],
) -> Entry:
    told = tuple(note for note in notes if note)
    entry = Entry(name, key, value, told, mapping.member, beside=beside)
    if mapping.env is not None:
        return replace(entry, place="environment")
    return replace(entry, place="argument") if mapping.positional else entry


def _bounded(entry: Entry, measured: Any, mapping: KnobMapping, known: Mapping[str, Any]) -> Entry:
    """The entry with what the table adds to its value, and within the bounds of the engine."""
    value, notes = entry.value, list(entry.notes)
    if mapping.plus is not None:
        value += known.get(mapping.plus, 0)
        notes.append(f"{entry.knob}={measured}")
    bound = known.get(mapping.at_most) if mapping.at_most is not None else None
    if bound is not None and value > bound:
        notes.append(f"measured with {measured}, more than {mapping.at_most} allows there")
        value = bound
    if mapping.maximum is not None and value > mapping.maximum:
        notes.append(f"measured with {measured}; {mapping.maximum} is the most there")
        value = mapping.maximum
    step = known.get(mapping.multiple_of) if mapping.multiple_of is not None else None
    if step is not None and value % step:
        notes.append(f"measured with {measured}; a multiple of {mapping.multiple_of} there")
        value = max(step, value - value % step)
    key = entry.key
    if value is False and mapping.negated_key is not None and key == mapping.key:
        key, value = mapping.negated_key, True
    return replace(entry, key=key, value=value, notes=tuple(notes))
