"""The problem-to-technique table: `search_spaces/techniques.yaml`, read and checked.

The file is data: conditions are typed comparisons of named facts, effects are numbers or named
formulas. Everything that can be wrong in it is found when it is read.
"""

from __future__ import annotations

import functools
import string
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from autotune.advise.advice import Effort
from autotune.advise.conditions import Condition, Scalar
from autotune.advise.facts import Facts, kind_of
from autotune.advise.formulas import FORMULAS, formula_arguments
from autotune.advise.knob_formulas import KNOB_FORMULAS
from autotune.conditional_knobs import idle_because
from autotune.diagnose.finding import Bottleneck, Metric
from autotune.errors import BadInput
from autotune.fast_yaml import safe_load
from autotune.predict.change import Factor, Term
from engine.config import KNOBS

Category = Literal["model", "kernels", "decoding", "scheduling", "reuse", "scale"]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NamedFormula(_Strict):
    """A formula by its name, with its arguments."""

    formula: str
    arguments: dict[str, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> NamedFormula:
        if self.formula not in FORMULAS:
            raise ValueError(f"{self.formula} is no formula; there are {', '.join(FORMULAS)}")
        taken = formula_arguments(self.formula)
        if not set(self.arguments) <= taken:
            raise ValueError(f"{self.formula} takes {', '.join(sorted(taken)) or 'no arguments'}")
        return self


class KnobValues(_Strict):
    """Values of a knob that depend on the profile: several to choose among by prediction."""

    formula: str
    by: list[float] = Field(default_factory=lambda: [1.0])

    @model_validator(mode="after")
    def _check(self) -> KnobValues:
        if self.formula not in KNOB_FORMULAS:
            raise ValueError(f"{self.formula} gives no knob; {', '.join(KNOB_FORMULAS)} do")
        return self


def _shape(value: Any) -> str:
    """Which of a number, a list and a formula is meant, so that a refusal is about that one."""
    if isinstance(value, (dict, BaseModel)):
        return "formula"
    return "list" if isinstance(value, list) else "one"


Effect = Annotated[
    Annotated[float, Tag("one")]
    | Annotated[list[float], Tag("list")]
    | Annotated[NamedFormula, Tag("formula")],
    Discriminator(_shape),
]
KnobSetting = Annotated[
    Annotated[Scalar, Tag("one")]
    | Annotated[list[Scalar], Tag("list")]
    | Annotated[KnobValues, Tag("formula")],
    Discriminator(_shape),
]


class Technique(_Strict):
    """One row: what answers a problem, when, by what means, at what price.

    `primary_for` and `secondary_for` are the bottlenecks it answers, `when` what must hold beside.
    `knobs` are set at once; a list or a formula gives values of which the best predicted is taken.
    `opens` are values worth a search. `effects` are factors on terms of the cost: a number, [low,
    value, high], or a formula; `outcomes` are gains of whole metrics that no term expresses.
    `outside_reach` says why the bundled engine cannot measure it. `alternative_to` names
    techniques that are as fast and come before it. One that `sheds_load` is judged by goodput,
    since what it refuses has no latency. `why` and `trade_off` may name facts in braces.
    """

    id: str
    title: str
    category: Category
    primary_for: list[Bottleneck] = Field(default_factory=list)
    secondary_for: list[Bottleneck] = Field(default_factory=list)
    when: Condition | None = None
    knobs: dict[str, KnobSetting] = Field(default_factory=dict)
    opens: dict[str, list[Scalar]] = Field(default_factory=dict)
    effects: dict[Term, Effect] = Field(default_factory=dict)
    outcomes: dict[Metric, Effect] = Field(default_factory=dict)
    effort: Effort
    trade_off: str
    check: str
    why: str
    source: str
    outside_reach: str | None = None
    alternative_to: list[str] = Field(default_factory=list)
    sheds_load: bool = False

    @model_validator(mode="after")
    def _check(self) -> Technique:
        if not self.primary_for and not self.secondary_for:
            raise ValueError("answers no bottleneck")
        if set(self.primary_for) & set(self.secondary_for):
            raise ValueError("a bottleneck is both primary and secondary")
        if not self.knobs and self.outside_reach is None:
            raise ValueError("sets no knob and does not say why it is out of reach")
        for effect in [*self.effects.values(), *self.outcomes.values()]:
            _check_range(effect)
        for text in (self.why, self.trade_off):
            for _, name, _, _ in string.Formatter().parse(text):
                if name is not None and kind_of(name) is None:
                    raise ValueError(f"{name}, named in a sentence, is no fact of a profile")
        for name, values in [*self.knobs.items(), *self.opens.items()]:
            _check_values(name, values)
        return self


class Symptom(_Strict):
    """A problem as people put it: the bottlenecks behind it in these metrics, and its answers."""

    title: str
    metrics: list[Metric]
    bottlenecks: list[Bottleneck]
    primary: list[str]
    secondary: list[str]


class Table(_Strict):
    """All techniques and symptoms; `other_engines_knobs` are those the bundled engine lacks."""

    other_engines_knobs: list[str]
    symptoms: dict[str, Symptom]
    techniques: list[Technique]

    @model_validator(mode="after")
    def _check(self) -> Table:
        rows = {row.id: row for row in self.techniques}
        if len(rows) < len(self.techniques):
            raise ValueError("two techniques have the same id")
        for row in self.techniques:
            if not set(row.alternative_to) <= set(rows):
                raise ValueError(f"{row.id}: alternative_to names no technique")
            strange = set(row.knobs) | set(row.opens)
            strange -= set(KNOBS) | set(self.other_engines_knobs)
            if strange:
                raise ValueError(f"{row.id}: {', '.join(sorted(strange))} is no knob")
        for name, symptom in self.symptoms.items():
            for technique in [*symptom.primary, *symptom.secondary]:
                if technique not in rows:
                    raise ValueError(f"{name}: {technique} is no technique")
                row = rows[technique]
                if not {*row.primary_for, *row.secondary_for} & set(symptom.bottlenecks):
                    raise ValueError(f"{name}: {technique} answers none of its bottlenecks")
        return self

    def technique(self, name: str) -> Technique:
        """The row with this id.

        Raises:
            KeyError: there is none.
        """
        return next(row for row in self.techniques if row.id == name)


@functools.cache
def load_table(path: Path | None = None) -> Table:
    """The table that is shipped, or one from a file.

    Raises:
        BadInput: it cannot be read, or a row is wrong; the message names the row.
    """
    source = path if path is not None else resources.files("search_spaces") / "techniques.yaml"
    try:
        raw = safe_load(source.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInput(f"technique table {source} cannot be read: {error}") from error
    try:
        return Table.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        row = _row_of(raw, first["loc"])
        raise BadInput(f"technique table {source}: {row}{place}: {first['msg']}") from None


def factor_of(effect: Effect, facts: Facts) -> Factor | None:
    """An effect as a factor with its range; None where a fact is missing."""
    if isinstance(effect, NamedFormula):
        return FORMULAS[effect.formula](facts, **effect.arguments)
    if isinstance(effect, list):
        low, value, high = effect
        return Factor(value, low, high)
    return Factor(float(effect), float(effect), float(effect))


def knob_values(name: str, setting: KnobSetting, facts: Facts) -> list[Any]:
    """Values that a row proposes for a knob, best guess first, clipped to what the knob allows.

    The present value is not among them, unless the knob does nothing at present.
    """
    if isinstance(setting, KnobValues):
        proposed = KNOB_FORMULAS[setting.formula](facts, knob=name, by=setting.by)
        values = [_within(name, value) for value in proposed]
    else:
        values = list(setting) if isinstance(setting, list) else [setting]
    idle = idle_because(name, facts.profile.engine_config or {}) is not None
    now = facts.get(f"config.{name}") if name in KNOBS and not idle else None
    return [v for v in dict.fromkeys(values) if v is not None and v != now]


def _within(name: str, value: float) -> Any:
    """The nearest value that the knob allows."""
    knob = KNOBS[name]
    if knob.choices is not None:
        return min(knob.choices, key=lambda choice: abs(choice - value))
    if knob.minimum is not None:
        value = max(value, knob.minimum)
    if knob.maximum is not None:
        value = min(value, knob.maximum)
    return round(value) if knob.type is int else value


def _check_range(effect: Effect) -> None:
    if isinstance(effect, list) and not (
        len(effect) == 3 and 0 <= effect[0] <= effect[1] <= effect[2]
    ):
        raise ValueError(f"{effect} is no [low, value, high]")
    if isinstance(effect, float) and effect < 0:
        raise ValueError(f"{effect} is below 0")


def _check_values(name: str, setting: KnobSetting) -> None:
    """Refuse a value that the engine would refuse."""
    if name not in KNOBS or isinstance(setting, KnobValues):
        return
    knob = KNOBS[name]
    for value in setting if isinstance(setting, list) else [setting]:
        if knob.choices is not None and value not in knob.choices:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(map(str, knob.choices))}")
        if type(value) is not knob.type:
            raise ValueError(f"{name} must be of type {knob.type.__name__}, got {value!r}")


def _row_of(raw: Any, place: tuple[Any, ...]) -> str:
    if len(place) > 1 and place[0] == "techniques" and isinstance(place[1], int):
        row = raw["techniques"][place[1]]
        if isinstance(row, dict) and "id" in row:
            return f"{row['id']}: "
    return ""
