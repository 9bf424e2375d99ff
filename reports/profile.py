"""The tables of a profile: its phases, and what was seen of cache, queue and host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from reports.formatting import (
    MISSING,
    duration,
    mapping,
    milliseconds,
    number,
    percent,
    sequence,
    significant,
    size,
)

PHASE_COLUMNS = (
    "Phase",
    "Steps",
    "Time",
    "Share",
    "Sequences a step",
    "Median step",
    "p95 step",
    "MFU",
    "MBU",
    "Bound by",
)

Write = Callable[[float | None], str]
# By the part of the profile: field, name and how it is written.
_FACTS: Mapping[str, tuple[str, tuple[tuple[str, str, Write], ...]]] = {
    "kv": (
        "KV cache",
        (
            ("total_bytes", "Size", size),
            ("occupancy_mean", "Owned blocks, mean", percent),
            ("occupancy_peak", "Owned blocks, peak", percent),
            ("fragmentation", "Fragmentation", percent),
            ("preemptions", "Preemptions", significant),
            ("recomputed_share", "Prompt tokens computed again", percent),
            ("blocked_share", "Time waiting for blocks", percent),
            ("refused_for_size", "Refused for size", significant),
            ("hit_rate", "Prefix hits", percent),
            ("attainable_hit_rate", "Prefix hits the trace allows", percent),
            ("seats", "Mean requests it holds", significant),
        ),
    ),
    "queueing": (
        "Queueing",
        (
            ("utilisation", "Arrivals, of what full batches sustain", percent),
            ("busy_share", "Time with a step under way", percent),
            ("wait_share", "Waiting, of TTFT", percent),
            ("queue_mean", "Waiting requests, mean", significant),
            ("queue_max", "Waiting requests, most", significant),
            ("running_mean", "Running sequences, mean", significant),
            ("at_seat_limit_share", "Time with all seats taken", percent),
            ("growth_per_s", "Growth, requests/s", significant),
        ),
    ),
    "traffic": (
        "Traffic",
        (
            ("requests", "Requests", significant),
            ("rate", "Requests/s", significant),
            ("arrival_cv", "Gaps’ coefficient of variation (Poisson: 1)", significant),
            ("dispersion", "Index of dispersion (Poisson: 1)", significant),
            ("top_output_share", "Output of the longest tenth", percent),
            ("prompt_output_ratio", "Prompt over output tokens", significant),
        ),
    ),
    "host": (
        "Host",
        (
            ("share", "Share of step time", percent),
            ("decode_share", "Share of decode steps", percent),
            ("per_step_s", "Per step", milliseconds),
            ("scheduler_share", "Scheduler’s share", percent),
        ),
    ),
    "communication": (
        "Communication",
        (
            ("ranks", "Ranks", significant),
            ("share", "Share of device time", percent),
            ("imbalance", "Waiting for slower ranks", percent),
        ),
    ),
    "gpu": (
        "GPU",
        (
            ("power_mean_watts", "Power, mean (W)", significant),
            ("power_limit_watts", "Power limit (W)", significant),
            ("clock_ratio", "Clock over its maximum", percent),
            ("throttled_share", "Samples throttled", percent),
        ),
    ),
}
_BOUNDS = {"compute": "arithmetic", "bandwidth": "memory", "overhead": "overhead"}


def phase_rows(profile: Mapping[str, Any]) -> list[list[str]]:
    """A row a phase, in the order of `PHASE_COLUMNS`."""
    rows = []
    for phase in map(mapping, sequence(profile.get("phases"))):
        rows.append(
            [
                str(phase.get("name")),
                significant(number(phase.get("steps"))),
                duration(number(phase.get("seconds"))),
                percent(number(phase.get("share"))),
                significant(number(phase.get("mean_batch"))),
                milliseconds(number(phase.get("step_p50"))),
                milliseconds(number(phase.get("step_p95"))),
                percent(number(phase.get("mfu"))),
                percent(number(phase.get("mbu"))),
                _BOUNDS.get(str(phase.get("bound")), MISSING),
            ]
        )
    return rows


def profile_facts(profile: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Titled lists of what was seen; what was not is left out."""
    groups = []
    for key, (title, fields) in _FACTS.items():
        part = mapping(profile.get(key))
        facts = [
            (name, write(value))
            for field, name, write in fields
            if (value := number(part.get(field))) is not None
        ]
        if facts:
            groups.append((title, facts))
    return groups


def partial_notes(profile: Mapping[str, Any]) -> list[str]:
    """What could not be measured, and why; and what else the profile says of itself."""
    return [
        str(note) for key in ("partial", "notes") for note in sequence(profile.get(key)) if note
    ]
