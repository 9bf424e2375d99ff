"""Typed conditions of the technique table, and whether they hold: yes, no, or not known.

    all:
      - {fact: device, is: cuda}
      - {fact: cuda_capability, at_least: 8.9}
      - not: {fact: quantized, is: true}

An unknown fact makes a condition unknown unless the rest decides it, as in Kleene's logic;
`present` asks whether a fact is known at all.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from autotune.advise.facts import Facts, Kind, kind_of

Scalar = bool | int | float | str

_ORDER = ("above", "below", "at_least", "at_most")
_OPERATORS: dict[str, tuple[Kind, ...]] = {
    "is": ("number", "text", "truth"),
    "is_not": ("number", "text", "truth"),
    "in": ("number", "text"),
    "contains": ("list",),
    **dict.fromkeys(_ORDER, ("number",)),
    "present": ("number", "text", "truth", "list"),
}
_TYPES: dict[Kind, tuple[type, ...]] = {
    "number": (int, float),
    "text": (str,),
    "truth": (bool,),
    "list": (str,),
}


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, strict=True)


class Leaf(_Strict):
    """One fact compared by one operator."""

    fact: str
    is_: Scalar | None = Field(None, alias="is")
    is_not: Scalar | None = None
    in_: list[Scalar] | None = Field(None, alias="in")
    contains: str | None = None
    above: float | None = None
    below: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    present: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> Leaf:
        given = {n: v for n, v in self.model_dump(by_alias=True).items() if v is not None}
        given.pop("fact")
        if len(given) != 1:
            raise ValueError(f"{self.fact}: needs exactly one of {', '.join(_OPERATORS)}")
        kind = kind_of(self.fact)
        if kind is None:
            raise ValueError(f"{self.fact} is no fact of a profile")
        ((operator, operand),) = given.items()
        if kind not in _OPERATORS[operator]:
            raise ValueError(f"{self.fact} is a {kind}; {operator} does not apply to it")
        values = operand if isinstance(operand, list) else [operand]
        if operator != "present" and not all(_is_of(kind, value) for value in values):
            raise ValueError(f"{self.fact} is a {kind}; it is compared with {operand!r}")
        return self

    def holds(self, facts: Facts) -> bool | None:
        """Whether it holds; None: the fact is not known."""
        value = facts.get(self.fact)
        if self.present is not None:
            return (value is not None) == self.present
        if value is None:
            return None
        return self._compare(value)

    def _compare(self, value: Any) -> bool:
        if self.is_ is not None:
            return bool(value == self.is_)
        if self.is_not is not None:
            return bool(value != self.is_not)
        if self.in_ is not None:
            return value in self.in_
        if self.contains is not None:
            return self.contains in value
        if self.above is not None:
            return bool(value > self.above)
        if self.below is not None:
            return bool(value < self.below)
        if self.at_least is not None:
            return bool(value >= self.at_least)
        assert self.at_most is not None
        return bool(value <= self.at_most)

    def unknown(self, facts: Facts) -> list[str]:
        """The facts that would have to be known."""
        return [self.fact] if self.holds(facts) is None else []


class All(_Strict):
    """Every one of them."""

    all: list[Condition]

    def holds(self, facts: Facts) -> bool | None:
        """Whether all hold; None: none fails, but some is not known."""
        answers = [condition.holds(facts) for condition in self.all]
        return False if False in answers else None if None in answers else True

    def unknown(self, facts: Facts) -> list[str]:
        """The facts that would have to be known."""
        return [] if self.holds(facts) is not None else _missing(self.all, facts)


class AnyOf(_Strict):
    """At least one of them."""

    any: list[Condition]

    def holds(self, facts: Facts) -> bool | None:
        """Whether one holds; None: none does, but some is not known."""
        answers = [condition.holds(facts) for condition in self.any]
        return True if True in answers else None if None in answers else False

    def unknown(self, facts: Facts) -> list[str]:
        """The facts that would have to be known."""
        return [] if self.holds(facts) is not None else _missing(self.any, facts)


class Not(_Strict):
    """The contrary."""

    not_: Condition = Field(alias="not")

    def holds(self, facts: Facts) -> bool | None:
        """Whether the contrary holds; None: it is not known."""
        answer = self.not_.holds(facts)
        return None if answer is None else not answer

    def unknown(self, facts: Facts) -> list[str]:
        """The facts that would have to be known."""
        return self.not_.unknown(facts)


def _tag(value: Any) -> str:
    if isinstance(value, BaseModel):
        return {Leaf: "fact", All: "all", AnyOf: "any", Not: "not"}[type(value)]
    if isinstance(value, dict):
        return next((name for name in ("all", "any", "not") if name in value), "fact")
    return "fact"


Condition = Annotated[
    Annotated[Leaf, Tag("fact")]
    | Annotated[All, Tag("all")]
    | Annotated[AnyOf, Tag("any")]
    | Annotated[Not, Tag("not")],
    Discriminator(_tag),
]

for _model in (All, AnyOf, Not):
    _model.model_rebuild()


def _missing(conditions: list[Condition], facts: Facts) -> list[str]:
    return list(dict.fromkeys(name for c in conditions for name in c.unknown(facts)))


def _is_of(kind: Kind, value: Any) -> bool:
    if kind == "number" and isinstance(value, bool):
        return False
    return isinstance(value, _TYPES[kind])
