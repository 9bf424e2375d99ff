"""What a serving engine's own flags are: the tables of `search_spaces/engines/tuning/`.

Knobs carry the engine's names here, not those of the bundled engine; `same_as` tells where the
meaning is the same, so that a prediction may speak of both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from autotune.errors import AutotuneError, BadInput
from autotune.external.failures import FailurePattern
from autotune.fast_yaml import safe_load
from engine.config import KNOBS

Device = Literal["cpu", "cuda"]
DEVICES: tuple[Device, ...] = get_args(Device)
Value = bool | int | float | str
_TYPES: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (float, int),
    "str": (str,),
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class OnlyWith(_Strict):
    """The values of another knob beside which a knob does anything."""

    knob: str
    among: tuple[Value, ...]


class TableKnob(_Strict):
    """One knob of an engine.

    It is given by a `flag` (a truth by `flag` where it holds and by `negated_flag` where not, each
    of which may lack), as a `member` of a flag's JSON, by a variable of the `environment`, or with
    each request in `request_field`, be it beside a flag: then another value needs no restart.

    `search` lists the values that a search tries, in order, by device; a knob without any keeps
    what the user gives. `default` is what the engine takes by itself, None where that depends on
    the machine or the model. `absent` is the value that is said by giving none. `lossy`: it may
    change what is generated.
    """

    kind: Literal["bool", "int", "float", "str"]
    help: str
    flag: str | None = None
    negated_flag: str | None = None
    member: str | None = None
    environment: str | None = None
    request_field: str | None = None
    unit: str | None = None
    low: float | None = None
    high: float | None = None
    choices: tuple[Value, ...] | None = None
    search: Mapping[Device, tuple[Value, ...]] = Field(default_factory=dict)
    default: Mapping[Device, Value] = Field(default_factory=dict)
    devices: tuple[Device, ...] = DEVICES
    same_as: str | None = None
    only_with: OnlyWith | None = None
    lossy: bool = False
    absent: Value | None = None

    @field_validator("search", mode="before")
    @classmethod
    def _search_by_device(cls, given: Any) -> Any:
        return dict.fromkeys(DEVICES, given) if isinstance(given, (list, tuple)) else given

    @field_validator("default", mode="before")
    @classmethod
    def _default_by_device(cls, given: Any) -> Any:
        return given if isinstance(given, Mapping) else dict.fromkeys(DEVICES, given)

    @model_validator(mode="after")
    def _is_sound(self) -> TableKnob:
        flagged = self.flag is not None or self.negated_flag is not None
        if flagged and self.environment is not None:
            raise ValueError("a knob has a flag or a variable, not both")
        if not flagged and self.environment is None and self.request_field is None:
            raise ValueError("a knob has one of flag, environment and request_field")
        if self.negated_flag is not None and self.kind != "bool":
            raise ValueError("only a truth has a negated_flag")
        if self.member is not None and self.flag is None:
            raise ValueError("a member belongs to a flag")
        if self.same_as is not None and self.same_as not in KNOBS:
            raise ValueError(f"{self.same_as!r} is no knob of the bundled engine")
        for values in (*self.search.values(), self.default.values()):
            for value in values:
                if problem := self.problem(value):
                    raise ValueError(problem)
        return self

    @property
    def restarts(self) -> bool:
        """Whether another value needs another start of the server."""
        return self.request_field is None

    def problem(self, value: object) -> str | None:
        """What is wrong with a value by itself, as the end of a sentence; None: nothing."""
        types = _TYPES[self.kind]
        if not isinstance(value, types) or (isinstance(value, bool) and self.kind != "bool"):
            return f"{value!r} is no {self.kind}"
        if self.choices is not None and value not in self.choices:
            return f"{value!r} is none of {', '.join(map(str, self.choices))}"
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if not math.isfinite(value):
                return f"{value} is no finite number"
            if self.low is not None and value < self.low:
                return f"{value} is below {self.low:g}"
            if self.high is not None and value > self.high:
                return f"{value} is above {self.high:g}"
        return None

    def values_on(self, device: Device) -> tuple[Value, ...]:
        """The values that a search tries on a device; none: it is not searched there."""
        return self.search.get(device, ()) if device in self.devices else ()


class Rule(_Strict):
    """Values that the engine refuses together.

    Where every knob of `when` has one of the listed values: the first knob of `at_least` must be no
    less than the second, the first of `multiple_of` a multiple of the second, and `needs` must have
    a value; with none of them, the combination itself is refused. A comparison with what is not
    known (no value given, no default) is not broken.
    """

    why: str
    when: Mapping[str, tuple[Value, ...]] = Field(default_factory=dict)
    at_least: tuple[str, str] | None = None
    multiple_of: tuple[str, str] | None = None
    needs: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Rule:
        ways = sum(way is not None for way in (self.at_least, self.multiple_of, self.needs))
        if ways > 1 or (ways == 0 and not self.when):
            raise ValueError("a rule has one of at_least, multiple_of and needs, or a `when` alone")
        return self

    @property
    def knobs(self) -> tuple[str, ...]:
        """Every knob that it speaks of."""
        needed = () if self.needs is None else (self.needs,)
        return (*self.when, *(self.at_least or ()), *(self.multiple_of or ()), *needed)

    def broken_by(self, values: Mapping[str, Value]) -> bool:
        """Whether the values, defaults among them, break it."""
        if any(values.get(name) not in among for name, among in self.when.items()):
            return False
        if self.needs is not None:
            return self.needs not in values
        if self.at_least is not None:
            first, second = (values.get(name) for name in self.at_least)
            return _number(first) and _number(second) and first < second  # type: ignore[operator]
        if self.multiple_of is not None:
            first, second = (values.get(name) for name in self.multiple_of)
            # A knob that is switched off by 0 or -1 is a multiple of everything.
            whole = isinstance(first, int) and isinstance(second, int) and first > 0 and second > 0
            return whole and first % second != 0  # type: ignore[operator]
        return True


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class LengthKnob(_Strict):
    """The knob that bounds prompt and answer together, in tokens.

    With `times`, its value is shared by as many requests as that other knob says.
    """

    knob: str
    times: str | None = None


class ResetCall(_Strict):
    """The call that empties the prefix cache; it may need variables in the environment."""

    path: str
    environment: Mapping[str, str] = Field(default_factory=dict)


class Version(_Strict):
    """How to ask for the version, and which releases' own parsers the flags were checked with.

    `pattern` finds the version in what the program prints, in its first group. `cpu_pattern` finds
    builds that run on a processor alone. `help` are the arguments that list all flags.
    """

    arguments: tuple[str, ...]
    pattern: str
    checked: tuple[str, ...] = Field(min_length=1)
    cpu_pattern: str | None = None
    help: tuple[str, ...] = ()
    distribution: str | None = None


class Extras(_Strict):
    """What a device takes at every start, beside what all of them do."""

    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = Field(default_factory=dict)


class Stage(_Strict):
    """What a line of the log says of the start: the last stage whose pattern was seen goes on."""

    pattern: str
    says: str


class EngineTable(_Strict):
    """One engine's table.

    `arguments` stand after the program's name, with {model}, {host}, {port} and {served_name} put
    in, those of `on_device` behind them; `program_arguments` before them, `module_arguments` where
    the program is a Python that has the `module`. `facts` find in the log what the engine came to:
    name to pattern, the first group being the value.
    """

    engine: str
    title: str
    program: str
    program_arguments: tuple[str, ...] = ()
    module: str | None = None
    module_arguments: tuple[str, ...] = ()
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = Field(default_factory=dict)
    on_device: Mapping[Device, Extras] = Field(default_factory=dict)
    version: Version
    health_path: str
    metrics_path: str
    start_limit_s: float = Field(gt=0)
    stop_grace_s: float = Field(gt=0)
    reset_cache: ResetCall | None = None
    length: LengthKnob
    knobs: Mapping[str, TableKnob]
    rules: tuple[Rule, ...] = ()
    stages: tuple[Stage, ...] = ()
    facts: Mapping[str, str] = Field(default_factory=dict)
    failures: tuple[FailurePattern, ...]

    @model_validator(mode="after")
    def _names_exist(self) -> EngineTable:
        for name in self._names():
            if name not in self.knobs:
                raise ValueError(f"{name!r} is no knob of the table")
        patterns = [*(s.pattern for s in self.stages), *self.facts.values(), self.version.pattern]
        patterns += [f.pattern for f in self.failures]
        for pattern in patterns:
            re.compile(pattern)
        return self

    def _names(self) -> Iterator[str]:
        yield self.length.knob
        if self.length.times is not None:
            yield self.length.times
        for rule in self.rules:
            yield from rule.knobs
        for knob in self.knobs.values():
            if knob.only_with is not None:
                yield knob.only_with.knob

    def searched(self, device: Device, *, lossy: bool = False) -> dict[str, tuple[Value, ...]]:
        """The knobs that a search may choose on a device, with the values it tries.

        `lossy`: those that may change what is generated too.
        """
        return {
            name: values
            for name, knob in self.knobs.items()
            if (values := knob.values_on(device)) and (lossy or not knob.lossy)
        }

    def start(self, device: Device) -> Extras:
        """What every start on a device has: arguments with {…} to put in, and variables."""
        more = self.on_device.get(device, Extras())
        return Extras(
            arguments=(*self.arguments, *more.arguments),
            environment={**self.environment, **more.environment},
        )

    def defaults(self, device: Device) -> dict[str, Value]:
        """What the engine takes by itself on a device, as far as the table knows."""
        return {
            name: knob.default[device]
            for name, knob in self.knobs.items()
            if device in knob.devices and device in knob.default
        }

    def same_as(self, name: str) -> str | None:
        """The engine's name of a knob of the bundled engine with the same meaning, if it has it."""
        return next((own for own, knob in self.knobs.items() if knob.same_as == name), None)


def engine_tables() -> list[str]:
    """Names of the engines that can be started and tuned."""
    folder = resources.files("search_spaces") / "engines" / "tuning"
    names = (file.name for file in folder.iterdir())
    return sorted(n.removesuffix(".yaml") for n in names if n.endswith(".yaml") and n[0] != ".")


def load_table(name: str) -> EngineTable:
    """The table of one engine.

    Raises:
        BadInput: there is none of that name.
        AutotuneError: the installed table is broken.
    """
    known = engine_tables()
    if name not in known:
        raise BadInput(f"no engine {name!r} can be started here; known are {', '.join(known)}")
    source = resources.files("search_spaces") / "engines" / "tuning" / f"{name}.yaml"
    return read_table(source.read_text(encoding="utf-8"), name)


def read_table(text: str, name: str) -> EngineTable:
    """The table in a YAML text.

    Raises:
        AutotuneError: it is broken.
    """
    try:
        return EngineTable.model_validate(safe_load(text))
    except (yaml.YAMLError, ValidationError, re.error) as error:
        raise AutotuneError(f"the table of {name} is broken: {error}") from error
