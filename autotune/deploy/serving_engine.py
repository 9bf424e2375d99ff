"""How another serving engine spells the knobs: the tables of `search_spaces/engines/`."""

from __future__ import annotations

from importlib import resources
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from autotune.errors import AutotuneError, BadInput
from engine.config import KNOBS

Device = Literal["cpu", "cuda"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ValueRule(_Strict):
    """What becomes of one value of a knob, everywhere or on one device."""

    when: Any
    on: Device | None = None
    use: Any = None
    lost: str | None = None
    unneeded: str | None = None
    note: str | None = None

    @model_validator(mode="after")
    def _one_outcome(self) -> ValueRule:
        outcomes = [name for name in ("use", "lost", "unneeded") if name in self.model_fields_set]
        if len(outcomes) != 1:
            raise ValueError("a rule has one of use, lost and unneeded")
        return self

    def holds(self, value: Any, device: str) -> bool:
        """Whether the rule speaks of this value on this device; `True` is not 1."""
        same = type(self.when) is type(value) and self.when == value
        return same and self.on in (None, device)


class OnlyWith(_Strict):
    """Beside which values of another knob a key means the same; `otherwise` says why it is lost."""

    knob: str
    among: tuple[Any, ...]
    otherwise: str


class KnobMapping(_Strict):
    """How one knob is spelled; without a key it says what becomes of the knob instead."""

    key: str | None = None
    member: str | None = None
    only_with: OnlyWith | None = None
    negated_key: str | None = None
    rules: tuple[ValueRule, ...] = ()
    plus: str | None = None
    at_most: str | None = None
    overridden_by: str | None = None
    measured_on: tuple[Device, ...] = ()
    lost: str | None = None
    unneeded: str | None = None
    note: str | None = None

    @model_validator(mode="after")
    def _says_where_it_goes(self) -> KnobMapping:
        ways = sum(way is not None for way in (self.key, self.lost, self.unneeded))
        if ways != 1:
            raise ValueError("a knob has one of key, lost and unneeded")
        if self.member is not None and self.key is None:
            raise ValueError("a member belongs to a key")
        other = None if self.only_with is None else self.only_with.knob
        for name in (self.plus, self.at_most, self.overridden_by, other):
            if name is not None and name not in KNOBS:
                raise ValueError(f"{name!r} is no knob")
        return self


class ServingEngine(_Strict):
    """One serving engine's table.

    `version` is the release that the file is written for; `checked` lists the releases whose own
    argument parser was read to verify the keys.
    """

    engine: str
    title: str
    version: str
    checked: tuple[str, ...] = Field(min_length=1)
    file: str
    command: str
    knobs: dict[str, KnobMapping]

    @model_validator(mode="after")
    def _knobs_exist(self) -> ServingEngine:
        unknown = sorted(set(self.knobs) - set(KNOBS))
        if unknown:
            raise ValueError(f"no such knobs: {', '.join(unknown)}")
        return self


def serving_engines() -> list[str]:
    """Names of the engines that there is a table for."""
    folder = resources.files("search_spaces") / "engines"
    return sorted({f.name.removesuffix(".yaml") for f in folder.iterdir() if _is_table(f.name)})


def load_serving_engine(name: str) -> ServingEngine:
    """The table of one engine.

    Raises:
        BadInput: there is none of that name.
        AutotuneError: the installed table is broken.
    """
    known = serving_engines()
    if name not in known:
        raise BadInput(f"no serving engine {name!r}; known are {', '.join(known)}")
    source = resources.files("search_spaces") / "engines" / f"{name}.yaml"
    try:
        return ServingEngine.model_validate(yaml.safe_load(source.read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValidationError) as error:
        raise AutotuneError(f"the installed table of {name} is broken: {error}") from error


def _is_table(name: str) -> bool:
    return name.endswith(".yaml") and not name.startswith(".")
