"""A cause of a metric's time, before it is weighed against the others."""

from __future__ import annotations

from dataclasses import dataclass, field

from autotune.diagnose.finding import Bottleneck

Evidence = dict[str, float | int | str | bool | None]


@dataclass(frozen=True, slots=True)
class Cause:
    """A bottleneck with the part of the metric's time that it takes.

    `weight` says how much of a fault that time is (see `thresholds`), `sentence` what happens, in
    words of a newcomer.
    """

    bottleneck: Bottleneck
    share: float
    weight: float
    sentence: str
    evidence: Evidence = field(default_factory=dict)


@dataclass(slots=True)
class Causes:
    """The causes of one metric, and what of it could not be judged and why."""

    found: list[Cause] = field(default_factory=list)
    unjudged: list[str] = field(default_factory=list)
