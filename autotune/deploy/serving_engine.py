"""How another serving engine spells the knobs: the tables of `search_spaces/engines/`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from autotune.deploy.conversions import CONVERSIONS
from autotune.errors import AutotuneError, BadInput
from autotune.fast_yaml import safe_load
from engine.config import KNOBS

Device = Literal["cpu", "cuda"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class ValueRule(_Strict):
    """What becomes of one value of a knob, everywhere or on one device.

    `key` takes the place of the knob's own; `beside` are keys that are set along with it.
    """

    when: Any
    on: Device | None = None
    use: Any = None
    key: str | None = None
    beside: Mapping[str, Any] = Field(default_factory=dict)
    lost: str | None = None
    unneeded: str | None = None
    note: str | None = None

    @model_validator(mode="after")
    def _one_outcome(self) -> ValueRule:
        outcomes = [name for name in ("use", "lost", "unneeded") if name in self.model_fields_set]
        if len(outcomes) != 1:
            raise ValueError("a rule has one of use, lost and unneeded")
        if outcomes != ["use"] and (self.key or self.beside):
            raise ValueError("key and beside belong to use")
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


class KeyBy(_Strict):
    """The key, and how the value is converted for it, by the value of another knob."""

    knob: str
    keys: Mapping[Any, str | Mapping[str, str]]


class KnobMapping(_Strict):
    """How one knob is spelled; without a key it says what becomes of the knob instead.

    The head of `search_spaces/engines/vllm.yaml` tells what each member means.
    """

    key: str | None = None
    env: str | None = None
    convert: str | Mapping[str, str] | None = None
    key_by: KeyBy | None = None
    member: str | None = None
    positional: bool = False
    only_with: OnlyWith | None = None
    negated_key: str | None = None
    rules: tuple[ValueRule, ...] = ()
    plus: str | None = None
    at_most: str | None = None
    maximum: int | None = None
    multiple_of: str | None = None
    overridden_by: str | None = None
    carried_by: str | None = None
    measured_on: tuple[Device, ...] = ()
    lost: str | None = None
    unneeded: str | None = None
    note: str | None = None

    @model_validator(mode="after")
    def _says_where_it_goes(self) -> KnobMapping:
        keyless = isinstance(self.convert, Mapping)
        ways = (self.key, self.env, self.key_by, keyless or None, self.carried_by)
        if sum(way is not None for way in (*ways, self.lost, self.unneeded)) != 1:
            raise ValueError(
                "a knob has one of key, env, key_by, convert by key, carried_by, lost and unneeded"
            )
        if self.member is not None and self.key is None:
            raise ValueError("a member belongs to a key")
        for how in self._conversions():
            if how not in CONVERSIONS:
                raise ValueError(f"{how!r} is no conversion")
        only = None if self.only_with is None else self.only_with.knob
        by = None if self.key_by is None else self.key_by.knob
        others = (self.plus, self.at_most, self.multiple_of, self.overridden_by, self.carried_by)
        for name in (*others, only, by):
            if name is not None and name not in KNOBS:
                raise ValueError(f"{name!r} is no knob")
        return self

    def _conversions(self) -> list[str]:
        ways = [self.convert] if self.convert is not None else []
        if self.key_by is not None:
            ways += [way for way in self.key_by.keys.values() if not isinstance(way, str)]
        return [how for way in ways for how in ([way] if isinstance(way, str) else way.values())]

    def keys(self) -> set[str]:
        """Every key that this knob may write, environment variables and arguments left out."""
        found = {key for key in (self.key, self.negated_key) if key and not self.positional}
        found |= set(self.convert) if isinstance(self.convert, Mapping) else set()
        for way in self.key_by.keys.values() if self.key_by else ():
            found |= {way} if isinstance(way, str) else set(way)
        for rule in self.rules:
            found |= {rule.key} if rule.key else set()
            found |= set(rule.beside)
        return found


class Always(_Strict):
    """A key that is set whatever was measured, unless a knob sets it."""

    key: str
    value: Any
    note: str


class ServingEngine(_Strict):
    """One serving engine's table.

    `version` is the release that the files are written for; `checked` lists the releases whose own
    argument parser was run on the keys, or whose source was read for them (`checked_by`).
    `command` starts the server; {model}, {host}, {port} and {file} stand for what they say.
    `image` is the container of that version, `cpu_image` the one for machines without a GPU.
    `api` is where the OpenAI-compatible routes begin; requests name the model by `served_as`.
    """

    engine: str
    title: str
    version: str
    checked: tuple[str, ...] = Field(min_length=1)
    checked_by: Literal["parser", "source"] = "parser"
    file: str | None = None
    command: tuple[str, ...] = Field(min_length=1)
    prepare: tuple[str, ...] = ()
    served_as: Literal["model", "folder"] = "model"
    flags: Literal["switch", "value"] = "switch"
    devices: tuple[Device, ...] = ("cpu", "cuda")
    image: str | None = None
    cpu_image: str | None = None
    port: int = 8000
    health: str = "/health"
    api: str = "/v1"
    remarks: tuple[str, ...] = ()
    always: tuple[Always, ...] = ()
    knobs: dict[str, KnobMapping]

    @model_validator(mode="after")
    def _knobs_exist(self) -> ServingEngine:
        unknown = sorted(set(self.knobs) - set(KNOBS))
        if unknown:
            raise ValueError(f"no such knobs: {', '.join(unknown)}")
        if (self.file is not None) != ("{file}" in self.command):
            raise ValueError("a config file and {file} in the command go together")
        return self

    @property
    def start_script(self) -> str:
        """Name of the script that starts the server."""
        return "start.sh"

    @property
    def model_key(self) -> str:
        """The key of what is loaded; the engines that platforms run have one."""
        key = self.knobs["model"].key
        assert key is not None, f"{self.engine} has no key for its model"
        return key

    def keys(self) -> set[str]:
        """Every key that a translation may write."""
        found = {always.key for always in self.always}
        return found.union(*(mapping.keys() for mapping in self.knobs.values()))


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
    return _read(name)


@cache
def _read(name: str) -> ServingEngine:
    source = resources.files("search_spaces") / "engines" / f"{name}.yaml"
    try:
        return ServingEngine.model_validate(safe_load(source.read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValidationError) as error:
        raise AutotuneError(f"the installed table of {name} is broken: {error}") from error


def _is_table(name: str) -> bool:
    return name.endswith(".yaml") and not name.startswith(".")
