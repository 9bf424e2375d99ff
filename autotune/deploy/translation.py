"""What a configuration comes to in another engine's keys."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Entry:
    """One key of the other engine, the knob it came from, and what to know of it.

    With `member`, the value is that member of the key's JSON, to which other knobs may add. A key
    with dots is that path of a nested file. `beside` are further keys that the same knob sets, each
    with a value and a note. `carries` names further knobs whose meaning the value holds.
    """

    knob: str
    key: str
    value: Any
    notes: tuple[str, ...] = ()
    member: str | None = None
    place: Literal["setting", "environment", "argument"] = "setting"
    beside: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    carries: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A knob that has no key: `reason` says why, or what to do instead."""

    knob: str
    value: Any
    reason: str


@dataclass(frozen=True, slots=True)
class Translation:
    """Every knob that has a value is in exactly one of entries, lost and unneeded.

    `lost` did shape what was measured and does not carry over; `unneeded` needs no key there.
    `always` are keys that no knob sets, with the reason for each.
    """

    entries: tuple[Entry, ...]
    lost: tuple[LeftOut, ...]
    unneeded: tuple[LeftOut, ...]
    always: Mapping[str, tuple[Any, str]] = field(default_factory=dict)

    def flags(self) -> dict[str, Any]:
        """Keys, dotted where nested, with their values; members joined into a key's JSON."""
        values: dict[str, Any] = {key: value for key, (value, _) in self.always.items()}
        for entry in self.entries:
            if entry.place != "setting":
                continue
            if entry.member is None:
                values[entry.key] = entry.value
            else:
                values.setdefault(entry.key, {})[entry.member] = entry.value
            values.update({key: value for key, (value, _) in entry.beside.items()})
        return {k: json.dumps(v) if isinstance(v, dict) else v for k, v in values.items()}

    def settings(self) -> dict[str, Any]:
        """What the engine's file holds: `flags` with dotted keys as nested mappings."""
        nested: dict[str, Any] = {}
        for key, value in self.flags().items():
            *parents, leaf = key.split(".")
            place = nested
            for parent in parents:
                place = place.setdefault(parent, {})
            place[leaf] = value
        return nested

    def environment(self) -> dict[str, str]:
        """Environment variables that the engine is to be started with."""
        return {e.key: str(e.value) for e in self.entries if e.place == "environment"}

    def entry(self, knob: str) -> Entry | None:
        """What became of a knob, if it has a key."""
        return next((entry for entry in self.entries if entry.knob == knob), None)
