"""One piece of advice, and all of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from autotune.diagnose.finding import Bottleneck
from autotune.predict.gain import PredictedGain

ADVICE_VERSION = 1

Effort = Literal["knob", "reload", "prepare", "deploy", "train", "buy"]
# In order: set a flag; load the model again; convert or calibrate a checkpoint; change how it is
# deployed; train something; buy hardware.
EFFORTS: tuple[Effort, ...] = ("knob", "reload", "prepare", "deploy", "train", "buy")
Confidence = Literal["high", "medium", "low"]


@dataclass(frozen=True, slots=True)
class Advice:
    """A technique that answers a finding of this profile.

    `gain` is over the metric of the SLO that binds, `gains` over every metric that could be judged.
    `knobs` can be set at once (none where no knob does it), `opens` are values worth searching.
    `testable` says whether the bundled engine can measure it on this device; `why_not` why not.
    `problems` are the findings that it answers, `role` whether it is a first answer to them or one
    to add. `check` says what to look at afterwards, `commands` what to type. `breaks` is a limit of
    the SLO that is met now and is predicted not to be any more.
    """

    technique: str
    title: str
    category: str
    problems: tuple[Bottleneck, ...]
    role: Literal["primary", "secondary"]
    knobs: Mapping[str, Any]
    opens: Mapping[str, tuple[Any, ...]]
    gain: PredictedGain | None
    gains: tuple[PredictedGain, ...]
    confidence: Confidence
    effort: Effort
    trade_off: str
    check: str
    why: str
    testable: bool
    why_not: str | None = None
    breaks: str | None = None
    commands: tuple[str, ...] = ()
    source: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values, the first problem also by itself."""
        return {
            "technique": self.technique,
            "title": self.title,
            "category": self.category,
            "problem": self.problems[0] if self.problems else None,
            "problems": list(self.problems),
            "role": self.role,
            "knobs": dict(self.knobs),
            "opens": {name: list(values) for name, values in self.opens.items()},
            "gain": None if self.gain is None else self.gain.to_json(),
            "gains": [gain.to_json() for gain in self.gains],
            "confidence": self.confidence,
            "effort": self.effort,
            "trade_off": self.trade_off,
            "check": self.check,
            "why": self.why,
            "testable": self.testable,
            "why_not": self.why_not,
            "breaks": self.breaks,
            "commands": list(self.commands),
            "source": self.source,
        }


@dataclass(frozen=True, slots=True)
class Relaxation:
    """One way to make an infeasible SLO feasible, quantified.

    `kind` says what gives: the limit itself, the load, the lengths, or the configuration.
    """

    kind: Literal["limit", "load", "lengths", "technique"]
    sentence: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    technique: str | None = None


@dataclass(frozen=True, slots=True)
class Infeasible:
    """A limit that cannot be met, and why.

    `bound` is the least (or for throughput greatest) value that this device allows, in the unit of
    the limit; `proof` derives it from bytes or operations and the measured ceiling. `proven` is
    false where it only follows from predictions or measurements of this configuration.
    """

    limit: str
    metric: str
    asked: float
    bound: float | None
    proven: bool
    proof: str
    relaxations: tuple[Relaxation, ...] = ()


@dataclass(frozen=True, slots=True)
class AdviceList:
    """Advice, best first, and what cannot be had at all."""

    advice: tuple[Advice, ...]
    first: str | None = None
    infeasible: tuple[Infeasible, ...] = ()
    symptoms: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Content of `advice.json`."""
        return {
            "advice_version": ADVICE_VERSION,
            "first": self.first,
            "symptoms": list(self.symptoms),
            "advice": [item.to_json() for item in self.advice],
            "infeasible": [asdict(item) for item in self.infeasible],
            "notes": list(self.notes),
        }
