"""What an exporter is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from autotune.deploy.evidence import Evidence
from autotune.deploy.translate import LeftOut
from engine.config import EngineConfig

# The bundled engine, among the targets and among the engines that platforms run.
BUNDLED = "engine"


@dataclass(frozen=True, slots=True)
class Deployment:
    """A configuration that is to be deployed, and all that is known of it.

    Arguments:
        config: what was measured.
        evidence: what was measured of it.
        run: the content of `run.json`, its result included.
        measured: what unset knobs came to; see `translate`.
        engine: the engine that a platform is to run, where it can run several; None for the
            platform's first.
        model: what the target loads in place of the measured folder: a name of the Hugging Face
            hub, a URI, or a path that is valid there.
        max_replicas: how far a platform that scales by itself may go.
    """

    config: EngineConfig
    evidence: Evidence
    run: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)
    engine: str | None = None
    model: str | None = None
    max_replicas: int = 4


@dataclass(frozen=True, slots=True)
class Exported:
    """The files of one target, by name; the first is the one that its tool reads.

    Names that end in `.sh` are written as executables. `lost` are the knobs that shaped what was
    measured and do not carry over; `warnings` is what else a person should know. Both also stand
    in the files as comments.
    """

    files: Mapping[str, str]
    lost: tuple[LeftOut, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Target:
    """One thing to export to.

    `carries` names the engines that a platform can run, the default first; an engine carries
    nothing.
    """

    name: str
    write: Callable[[Deployment], Exported]
    carries: tuple[str, ...] = ()
