"""What a profile found, and how it is kept in a folder of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autotune.diagnose.diagnose import diagnose
from autotune.diagnose.finding import Diagnosis
from autotune.profiling.evidence import LoadEvidence
from autotune.profiling.file import write_profile
from autotune.profiling.schema import Profile
from autotune.records import SCHEMA_VERSION, RunFolder, utc_now
from autotune.search.windows import write_windows
from autotune.workload.materialise import LoadRequest
from engine.config import EngineConfig

TRACE_NAME = "trace.json"


@dataclass(frozen=True, slots=True)
class ProfileOutcome:
    """A profile with its diagnosis.

    `evidence` and `config` are None for a server that was sampled from outside. `model`, `workload`
    and `versions` are what `run.json` says of them. `trace` is the Chrome trace, where one was
    asked for. `interrupted` says that the load was ended early.
    """

    profile: Profile
    diagnosis: Diagnosis
    evidence: LoadEvidence | None = None
    config: EngineConfig | None = None
    model: dict[str, Any] | None = None
    workload: dict[str, Any] | None = None
    versions: dict[str, Any] = field(default_factory=dict)
    trace: Path | None = None
    interrupted: bool = False

    def to_json(self) -> dict[str, Any]:
        """The profile's own keys, and the findings."""
        return {**self.profile.model_dump(mode="json"), **_findings(self.diagnosis)}


def concluded(profile: Profile, partial: Iterable[str] = (), **others: Any) -> ProfileOutcome:
    """A profile, with more sentences on what it lacks, and its diagnosis."""
    lacks = dict.fromkeys([*profile.partial, *partial])
    profile = profile.model_copy(update={"partial": list(lacks)})
    return ProfileOutcome(profile, diagnose(profile), **others)


def keep_records(folder: RunFolder, evidence: LoadEvidence) -> None:
    """Put the records of the load on disk, as trial 0, and the prompts that were sent."""
    folder.write_part(0, evidence.requests, evidence.steps)
    folder.merge_parts()
    window = _window(evidence)
    if window:
        write_windows(folder, [window])


def keep_load(
    folder: RunFolder,
    evidence: LoadEvidence,
    metrics: Mapping[str, Any],
    command: Sequence[str],
    **about: Any,
) -> None:
    """Put a measured load on disk before anything is made of it.

    If what follows fails, `autotune profile --from` reads it.

    Args:
        folder: where.
        evidence: records and prompts.
        metrics: of the load, by the keys of `bench --json`.
        command: for `run.json`.
        about: more of `run.json`: config, workload, hardware and the like.
    """
    keep_records(folder, evidence)
    run = {**_run_json(command, "unfinished"), **about, "metrics": dict(metrics)}
    folder.write_json(folder.run_json, run)


def keep_outcome(folder: RunFolder, outcome: ProfileOutcome, command: Sequence[str]) -> None:
    """Write `profile.json`, `diagnosis.json` and `run.json`, the last to be there."""
    write_profile(folder.profile_json, outcome.profile)
    folder.write_json(folder.diagnosis_json, outcome.diagnosis.to_json())
    profile = outcome.profile
    folder.write_json(
        folder.run_json,
        {
            **_run_json(command, "interrupted" if outcome.interrupted else "done"),
            "model": outcome.model or {},
            "engine_config": profile.engine_config or {},
            "workload": outcome.workload or {},
            "slo": profile.slo,
            "price": profile.price,
            "hardware": profile.hardware or {},
            "versions": outcome.versions,
            "seeds": {} if outcome.config is None else {"seed": outcome.config.seed},
            "source": profile.source.model_dump(mode="json"),
            "trace": None if outcome.trace is None else outcome.trace.name,
            "notes": profile.notes,
        },
    )


def _run_json(command: Sequence[str], status: str) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "profile",
        "command": list(command),
        "started_at": utc_now(),
        "status": status,
    }


def _window(evidence: LoadEvidence) -> list[LoadRequest]:
    """What was offered, as far as the prompts are known; none if some are not."""
    prompts = evidence.prompts
    if any(record.request_id not in prompts for record in evidence.requests):
        return []
    return [
        LoadRequest(
            record.request_id,
            record.intended_send,
            prompts[record.request_id],
            record.asked_output_tokens,
            record.session_id,
        )
        for record in evidence.requests
    ]


def _findings(diagnosis: Diagnosis) -> dict[str, Any]:
    body = diagnosis.to_json()
    return {key: body[key] for key in ("findings", "unjudged")}
