"""What the search and its trial process say to each other: one JSON object a line.

The search sends commands on the child's standard input. The child answers each with any number of
`Progress` and then exactly one other reply: a `MeasureCommand` with `Measured`, `BrokeGuard`,
`Failed` or `Lacking`, a `ProbeCommand` with `Probed`, `Failed` or `Lacking`. A child that dies
answers nothing, which the search reads as a crash.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

# Phase of a `Progress` while weights are quantized for the first time, which may take minutes.
QUANTIZING = "quantizing"

FailureKind = Literal["out_of_memory", "rejected", "crash", "timeout"]


@dataclass(frozen=True, slots=True)
class MeasureCommand:
    """Measure one engine config under one window of the workload.

    `rate_factor` multiplies the window's arrival rate; None offers every request at once.
    `drain_limit` is how many seconds after the last arrival unfinished requests become misses.
    With `guarded`, no load is offered where the quality breaks a limit of the SLO. Quantizing the
    weights for the first time may take `quantize_limit` seconds; None sets no limit. The request
    and step records go to disk under `trial`.
    """

    trial: int
    config: dict[str, Any]
    window: int
    rate_factor: float | None
    drain_limit: float
    seed: int
    slo: str
    guarded: bool = False
    quantize_limit: float | None = None


@dataclass(frozen=True, slots=True)
class ProbeCommand:
    """Measure what the machine and the parts of a step can do, for predictions.

    `config` is loaded, as for a measurement. `methods` and `cache_dtypes` are the values of
    `quantization` and `kv_cache_dtype` that the search may choose; all of it should take no longer
    than `budget_s` seconds.
    """

    config: dict[str, Any]
    methods: list[str]
    cache_dtypes: list[str]
    budget_s: float


@dataclass(frozen=True, slots=True)
class Progress:
    """What is going on; `finished` of `total` requests of a load, or layers that are quantized."""

    phase: str
    finished: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True)
class Measured:
    """The metrics (keys of `bench --json`) of one measurement, and the loaded model's notes."""

    metrics: dict[str, Any]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Probed:
    """What the probes found: the profile's `Ceilings` and `Probes` as plain values."""

    ceilings: dict[str, Any]
    probes: dict[str, Any]


@dataclass(frozen=True, slots=True)
class BrokeGuard:
    """The quality breaks a limit of the SLO, so no load was offered; None: it has no measure."""

    quality: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class CutShort:
    """A short load showed the configuration to be hopeless, so that no full one was offered.

    `metrics` are those of the short load, `reason` is one sentence.
    """

    metrics: dict[str, Any]
    reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The measurement failed; `reason` is one sentence."""

    kind: FailureKind
    reason: str


@dataclass(frozen=True, slots=True)
class Lacking:
    """Nothing can be measured here, whatever the configuration; `reason` is what is missing."""

    reason: str


Command = MeasureCommand | ProbeCommand
Reply = Progress | Measured | Probed | BrokeGuard | CutShort | Failed | Lacking
Answer = Measured | BrokeGuard | CutShort | Failed
_KINDS: dict[str, type[Reply] | type[Command]] = {
    kind.__name__: kind
    for kind in (
        *(MeasureCommand, ProbeCommand),
        *(Progress, Measured, Probed, BrokeGuard, CutShort, Failed, Lacking),
    )
}


def encode(message: Reply | Command) -> bytes:
    """One line."""
    body = {"message": type(message).__name__, **dataclasses.asdict(message)}
    return json.dumps(body, allow_nan=False).encode() + b"\n"


def decode(line: bytes) -> Reply | Command:
    """The message in a line.

    Raises:
        ValueError: the line holds no message.
    """
    body = json.loads(line)
    try:
        return _KINDS[body.pop("message")](**body)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"not a message: {line[:80]!r}") from error
