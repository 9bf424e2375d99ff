"""Which of an engine's flags a search may choose, among which values, and what may stand together.

None as a value leaves the knob to the engine; so does its table's default, which is then not given.
"""

from __future__ import annotations

import difflib
import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from autotune.errors import BadInput
from autotune.external.flags import idle_knobs, problems_of
from autotune.external.table import Device, EngineTable, TableKnob, Value
from autotune.fast_yaml import safe_load

# More values than these in a list are no choice that a search of few trials could make.
_MOST_VALUES = 32
Point = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class FlagConfig:
    """Values of an engine's knobs; None leaves one to the engine."""

    values: Mapping[str, Value | None]

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name."""
        return dict(self.values)

    def given(self, table: EngineTable, device: Device) -> dict[str, Value]:
        """The values that the engine is told: what it would take by itself is left out."""
        defaults = table.defaults(device)
        return {
            name: value
            for name, value in self.values.items()
            if value is not None and not _same(defaults.get(name), value)
        }


@dataclass(frozen=True, slots=True)
class FlagSpace:
    """Values to try by knob, each list in increasing order where it holds numbers."""

    table: EngineTable
    device: Device
    values: Mapping[str, tuple[Any, ...]]

    @property
    def size(self) -> int:
        """Number of points, those that are equal for the engine counted apart."""
        return math.prod(len(choices) for choices in self.values.values())

    def is_ordinal(self, knob: str) -> bool:
        """Whether the order of a knob's values means something."""
        return self.table.knobs[knob].kind in ("int", "float")

    def idle(self, knob: str, values: Mapping[str, Any]) -> bool:
        """Whether a knob does nothing beside these values of others."""
        known = {n: v for n, v in values.items() if v is not None}
        return knob in idle_knobs(self.table, {**known, knob: known.get(knob, False)}, self.device)

    def normalised(self, point: Point, base: FlagConfig) -> dict[str, Any]:
        """The point with the values of `base` for knobs that do nothing at it."""
        values = {**base.values, **point}
        return {
            name: base.values.get(name) if self.idle(name, values) else value
            for name, value in point.items()
        }

    def config_of(self, point: Point, base: FlagConfig) -> FlagConfig:
        """The values at a point; other knobs as in `base`."""
        return FlagConfig({**base.values, **self.normalised(point, base)})

    def point_in(self, config: Mapping[str, Any], base: FlagConfig) -> dict[str, Any] | None:
        """The point of a trial's config; None if one of its values is not in the space."""
        values = {**base.values, **config}
        point = {name: values.get(name) for name in self.values}
        inside = all(_among(value, self.values[name]) for name, value in point.items())
        return point if inside else None

    def refusal(self, point: Point, base: FlagConfig) -> str | None:
        """Why the engine would refuse a point; None: nothing is known against it."""
        given = self.config_of(point, base).given(self.table, self.device)
        problems = problems_of(self.table, given, self.device)
        return "; ".join(problems) if problems else None

    def sound(self, point: Point, base: FlagConfig) -> dict[str, Any] | None:
        """The point as the engine would take it; None if it would refuse it.

        What begins to matter by another knob's value, and has none, gets the middle of its list.
        """
        normalised = self.normalised(point, base)
        if self.refusal(normalised, base) is None:
            return normalised
        values = {**base.values, **normalised}
        for name, choices in self.values.items():
            condition = self.table.knobs[name].only_with
            known = [value for value in choices if value is not None]
            if condition and known and values.get(name) is None and not self.idle(name, values):
                normalised[name] = known[len(known) // 2]
        return normalised if self.refusal(normalised, base) is None else None

    def seeds(self, base: FlagConfig) -> list[tuple[str, dict[str, Any]]]:
        """The default, and for each knob the ends of its list or its other choices, one at a time.

        What the engine would refuse is left out.
        """
        start = self.point_in({}, base)
        assert start is not None, "the space is widened by the default first"
        seeds = [("default", dict(start))]
        for name, values in self.values.items():
            ends: Sequence[Any] = values
            if self.is_ordinal(name):
                numbers = [value for value in values if value is not None]
                ends = (numbers[0], numbers[-1])
            for value in ends:
                point = self.sound({**start, name: value}, base)
                if point is not None and all(point != other for _, other in seeds):
                    seeds.append((f"extreme: {name}={_plain(value)}", point))
        return seeds

    def candidates(
        self, base: FlagConfig, most: int, seed: int, knobs: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Points that differ from the default in some of `knobs`, to think of.

        All where there are at most `most` combinations, else the ends of each knob's values and
        drawn ones. Of what is the same engine one point; what it would refuse is left out.
        """
        start = self.point_in({}, base)
        assert start is not None, "the space is widened by the default first"
        varied = {name: values for name, values in self.values.items() if name in knobs}
        points: Iterator[Point]
        if math.prod(len(values) for values in varied.values()) <= most:
            combinations = itertools.product(*varied.values())
            points = ({**start, **dict(zip(varied, c, strict=True))} for c in combinations)
        else:
            ends = ({**start, name: v} for name, vs in varied.items() for v in (vs[0], vs[-1]))
            points = itertools.chain(ends, self._drawn(varied, start, 4 * most, seed))
        found: dict[str, dict[str, Any]] = {}
        for point in points:
            if len(found) >= most:
                break
            sound = self.sound(point, base)
            if sound is not None:
                found.setdefault(point_key(sound), sound)
        return list(found.values())

    def neighbours(self, point: Point, base: FlagConfig) -> list[dict[str, Any]]:
        """Points that differ in one knob: of numbers the next ones, of choices all."""
        found: dict[str, dict[str, Any]] = {}
        for name, values in self.values.items():
            choices: Sequence[Any] = values
            if self.is_ordinal(name):
                place = values.index(point[name])
                choices = values[max(0, place - 1) : place + 2]
                if point[name] is None:
                    choices = values  # the engine's own choice lies somewhere among them
            for value in choices:
                other = self.sound({**point, name: value}, base)
                if other is not None and other != dict(point):
                    found[point_key(other)] = other
        return list(found.values())

    @staticmethod
    def _drawn(
        varied: Mapping[str, Sequence[Any]], start: Point, count: int, seed: int
    ) -> Iterator[Point]:
        rng = random.Random(seed)
        for _ in range(count):
            yield {**start, **{name: rng.choice(values) for name, values in varied.items()}}


def point_key(point: Point) -> str:
    """The same text for the same point."""
    return str(sorted(point.items(), key=lambda item: item[0]))


def default_config(
    table: EngineTable, device: Device, fixed: Mapping[str, Value], searched: Sequence[str]
) -> FlagConfig:
    """The engine as it is without a search: what is fixed, and its own defaults."""
    defaults = table.defaults(device)
    return FlagConfig({**{name: defaults.get(name) for name in searched}, **fixed})


def load_flag_space(
    table: EngineTable,
    device: Device,
    narrowing: Mapping[str, Sequence[Any]],
    path: Path | None = None,
    *,
    fixed: Mapping[str, Value] | None = None,
    lossy: bool = False,
) -> FlagSpace:
    """The space of an engine on a device, from its table or from a user's file.

    `narrowing` replaces the values of single knobs. What is fixed, or has a single value, is not
    searched. The engine's own choice is among the values of every knob.

    Raises:
        BadInput: a file that cannot be read, an unknown knob, or a value that is refused.
    """
    values: dict[str, Sequence[Any]] = dict(table.searched(device, lossy=lossy))
    if path is not None:
        values = _read(path, table)
    narrowed = {knob_name(table, name): choices for name, choices in narrowing.items()}
    defaults = table.defaults(device)
    space: dict[str, tuple[Any, ...]] = {}
    for name, choices in {**values, **narrowed}.items():
        where = "--search" if name in narrowed else str(path or "the table")
        checked = _checked(table, device, name, choices, where)
        if name in (fixed or {}) or (name in narrowed and len(checked) == 1):
            continue
        own = defaults.get(name)
        merged = checked if _among(own, checked) else (own, *checked)
        if len(merged) > 1:
            space[name] = _ordered(merged, table.knobs[name].kind in ("int", "float"))
    return FlagSpace(table, device, space)


def fixed_values(
    table: EngineTable, fixed: Mapping[str, Any], narrowing: Mapping[str, Sequence[Any]]
) -> dict[str, Value]:
    """What every trial has: the knobs that were set, and those narrowed to one value.

    Raises:
        BadInput: an unknown knob.
    """
    single = {name: values[0] for name, values in narrowing.items() if len(values) == 1}
    named = {knob_name(table, name): value for name, value in {**single, **fixed}.items()}
    return {name: _as_meant(table.knobs[name], value) for name, value in named.items()}


def knob_name(table: EngineTable, given: str) -> str:
    """A knob's name, with dashes or underscores, or by the bundled engine's name for it.

    Raises:
        BadInput: the engine has no such knob.
    """
    plain = given.strip().lstrip("-")
    for name in (plain, plain.replace("-", "_"), plain.replace("_", "-")):
        if name in table.knobs:
            return name
    same = table.same_as(plain.replace("-", "_"))
    if same is not None:
        return same
    near = difflib.get_close_matches(plain.replace("-", "_"), list(table.knobs), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(table.knobs)}"
    raise BadInput(f"{table.title} has no knob {given!r} that can be set here: {hint}")


def _read(path: Path, table: EngineTable) -> dict[str, Sequence[Any]]:
    try:
        raw = safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInput(f"search space {path} cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise BadInput(f"search space {path} must map knobs to lists of values")
    return {knob_name(table, str(name)): choices for name, choices in raw.items()}


def _checked(
    table: EngineTable, device: Device, name: str, choices: Any, where: str
) -> tuple[Value, ...]:
    knob = table.knobs[name]
    if device not in knob.devices:
        raise BadInput(f"{where}: {table.title} has {name} only on {' and '.join(knob.devices)}")
    if not isinstance(choices, (list, tuple)) or not 0 < len(choices) <= _MOST_VALUES:
        raise BadInput(f"{where}: {name} must list 1 to {_MOST_VALUES} values, got {choices!r}")
    values = tuple(_as_meant(knob, value) for value in choices)
    for value in values:
        if problem := knob.problem(value):
            raise BadInput(f"{where}: {name}: {problem}")
    return tuple(dict.fromkeys(values))


def _as_meant(knob: TableKnob, value: Any) -> Any:
    """A word that YAML has read as something else: on and off as truths, digits as a number."""
    if knob.kind != "str" or not isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, bool):
        word = "on" if value else "off"
        return word if word in (knob.choices or ()) else value
    return str(value)


def _ordered(values: Sequence[Any], numbers: bool) -> tuple[Any, ...]:
    """Numbers in increasing order, after None, with which the engine chooses for itself."""
    if not numbers:
        return tuple(values)
    return tuple(sorted(values, key=lambda value: (value is not None, value or 0)))


def _same(one: object, other: object) -> bool:
    """Whether two values are the same; `True` is not 1."""
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def _among(value: object, values: Sequence[object]) -> bool:
    return any(_same(value, other) for other in values)


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
