"""The records of one load, and the tokens that were sent in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from autotune.records import RequestRecord, RunFolder, TrialRecord
from autotune.search.windows import read_windows
from autotune.workload.materialise import LoadRequest
from engine.step_record import StepRecord

# Workloads that tell lengths, and not what was asked; their prompts are synthesised.
_LENGTHS_ONLY = ("preset", "azure", "mooncake", "burstgpt", "timed_trace")


@dataclass(frozen=True, slots=True)
class LoadEvidence:
    """What one load left behind; times are seconds since it began.

    `requests` lie in the order of their intended sends, `steps` in time. `prompts` are the token
    ids that were sent, by request id, as far as they are known. `synthetic_prompts` says whether
    these were made up from lengths; None where nobody knows.
    """

    requests: Sequence[RequestRecord]
    steps: Sequence[StepRecord]
    prompts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    synthetic_prompts: bool | None = None


def read_evidence(folder: RunFolder, trial: int) -> LoadEvidence:
    """Read what a run folder holds of one trial; of a bench or a profile that is trial 0.

    Prompts are there where the folder kept the window that the trial was offered. A search
    replaces that of the calibration, so its prompts are not known.

    Raises:
        BadInput: the folder holds no run.
    """
    workload = folder.read_run().get("workload")
    requests = folder.read_requests(trial)
    return LoadEvidence(
        requests=requests,
        steps=folder.read_steps(trial),
        prompts=_prompts(folder, trial, requests),
        synthetic_prompts=synthetic_prompts(workload),
    )


def prompts_of(requests: Sequence[LoadRequest]) -> dict[str, tuple[int, ...]]:
    """The prompts of a load by request id."""
    return {request.request_id: tuple(request.token_ids) for request in requests}


def synthetic_prompts(workload: object) -> bool | None:
    """Whether prompts were made up, by what `run.json` says of the workload; None if it does not.

    Made-up tokens repeat by chance alone, so that drafts found in them say nothing.
    """
    name = workload.get("format") if isinstance(workload, dict) else None
    return name in _LENGTHS_ONLY if isinstance(name, str) else None


def _prompts(
    folder: RunFolder, trial: int, requests: Sequence[RequestRecord]
) -> dict[str, tuple[int, ...]]:
    try:
        windows = read_windows(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # none was kept, or it is damaged; a profile goes on without
    record = next((t for t in folder.read_trials() if t.number == trial), None)
    index = _window(record, len(windows))
    if index is None or index >= len(windows):
        return {}
    prompts = prompts_of(windows[index])
    # A window of other lengths is not the one that this trial was offered.
    if any(len(prompts.get(r.request_id, ())) != r.input_tokens for r in requests):
        return {}
    return {r.request_id: prompts[r.request_id] for r in requests}


def _window(trial: TrialRecord | None, num_windows: int) -> int | None:
    """The window that a trial was offered: the search's is the first, the proof's follow."""
    if trial is None or trial.kind == "search":
        return 0
    if trial.kind == "proof":
        return 1 + trial.round % (num_windows - 1) if num_windows > 1 else 0
    return None
