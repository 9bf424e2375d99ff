"""What the conditions and formulas of the technique table may ask of a profile.

A fact is a field of the profile by its path (`kv.hit_rate`, `traffic.input_tokens.p95`), a field of
a phase (`phase.decode.mean_batch`), a part of a breakdown (`breakdown.tpot.kv_reads`), a knob as it
was set (`config.max_num_seqs`), or one of the derived ones, which are functions in
`autotune.advise.derived`. What the profile cannot tell is None.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel

from autotune.diagnose.finding import Diagnosis, Finding
from autotune.profiling.schema import Phase, Profile
from autotune.search.methods_offered import Offer
from autotune.slo import Slo
from engine.config import KNOBS

Kind = Literal["number", "text", "truth", "list"]

PHASES = ("prefill", "decode", "mixed")
BREAKDOWNS = ("ttft", "tpot", "throughput")
# The components that `autotune.profiling.schema.Breakdown` names.
PARTS = (
    "queue",
    "prefill_linear",
    "prefill_attention",
    "interference",
    "weights",
    "linear_compute",
    "kv_reads",
    "drafting",
    "verification",
    "host",
    "communication",
    "preempted",
    "other",
    "idle",
)
_KINDS: Mapping[type, Kind] = {float: "number", int: "number", str: "text", bool: "truth"}


@dataclass(slots=True)
class Facts:
    """A profile with its findings and the promise, as the table's conditions see them.

    `offer` is what a search may choose on the profiled device; None where the device is unknown.
    """

    profile: Profile
    diagnosis: Diagnosis
    slo: Slo = field(default_factory=Slo)
    offer: Offer | None = None
    _known: dict[str, Any] = field(default_factory=dict)

    def get(self, path: str) -> Any:
        """The value of a fact, None if the profile does not tell it.

        Raises:
            KeyError: there is no such fact.
        """
        if path not in self._known:
            self._known[path] = self._find(path)
        return self._known[path]

    def number(self, path: str) -> float | None:
        """The value of a fact that is a number; None if it is not known."""
        value = self.get(path)
        return None if value is None else float(value)

    def findings(self, bottleneck: str) -> list[Finding]:
        """Findings of a bottleneck over all metrics, worst first."""
        found = [f for f in self.diagnosis.findings if f.bottleneck == bottleneck]
        return sorted(found, key=lambda f: -f.severity)

    def _find(self, path: str) -> Any:
        if path in DERIVED:
            return DERIVED[path].of(self)
        head, _, rest = path.partition(".")
        if head == "config":
            if rest not in KNOBS:
                raise KeyError(path)
            return (self.profile.engine_config or {}).get(rest)
        if head == "phase":
            name, _, leaf = rest.partition(".")
            return _at(next((p for p in self.profile.phases if p.name == name), None), leaf)
        if head == "breakdown":
            metric, _, part = rest.partition(".")
            breakdown = self.profile.breakdown(metric)
            return None if breakdown is None else breakdown.parts.get(part, 0.0)
        if kind_of(path) is None:
            raise KeyError(path)
        return _at(self.profile, path)


@dataclass(frozen=True, slots=True)
class Derived:
    """A fact that follows from several fields of the profile."""

    kind: Kind
    of: Callable[[Facts], Any]
    text: str


DERIVED: dict[str, Derived] = {}


def derived(kind: Kind) -> Callable[[Callable[[Facts], Any]], Callable[[Facts], Any]]:
    """Declare a derived fact; its name is the function's, its docstring what it means."""

    def declare(function: Callable[[Facts], Any]) -> Callable[[Facts], Any]:
        DERIVED[function.__name__] = Derived(kind, function, function.__doc__ or "")
        return function

    return declare


def kind_of(path: str) -> Kind | None:
    """What kind of value a fact has; None: there is no such fact."""
    if path in DERIVED:
        return DERIVED[path].kind
    head, _, rest = path.partition(".")
    if head == "config":
        return _KINDS[KNOBS[rest].type] if rest in KNOBS else None
    if head == "phase":
        name, _, leaf = rest.partition(".")
        return _field_kind(Phase, leaf) if name in PHASES else None
    if head == "breakdown":
        metric, _, part = rest.partition(".")
        return "number" if metric in BREAKDOWNS and part in PARTS else None
    return _field_kind(Profile, path)


def _field_kind(model: type[BaseModel], path: str) -> Kind | None:
    head, _, rest = path.partition(".")
    known = model.model_fields.get(head)
    if known is None:
        return None
    kind = _without_none(known.annotation)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return _field_kind(kind, rest) if rest else None
    if rest:
        return None
    if typing.get_origin(kind) is Literal:
        kind = type(typing.get_args(kind)[0])
    return _KINDS.get(kind) if isinstance(kind, type) else None


def _without_none(annotation: Any) -> Any:
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return next(a for a in typing.get_args(annotation) if a is not type(None))
    return annotation


def _at(value: Any, path: str) -> Any:
    for name in path.split("."):
        if value is None:
            return None
        value = getattr(value, name)
    return value


# The functions there register themselves; they need `Facts`, hence the place of this import.
from autotune.advise import derived as _derived  # noqa: E402, F401
