"""What a run measured of its winner, in the words of a configuration file's comments."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autotune.deploy.redaction import redacted
from autotune.plain_number import plain_number


@dataclass(frozen=True, slots=True)
class Evidence:
    """The measurements behind a configuration.

    `changes` holds default and chosen value of each tuned knob, `importances` each knob's share
    of what the objective varied by in the search. `trials` are the proof's measurements of the
    winner. `bench` is what they came to, with the keys of `bench --json`; `slo_met` is None
    without an SLO.
    """

    summary: tuple[str, ...] = ()
    changes: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    importances: Mapping[str, float] = field(default_factory=dict)
    trials: tuple[int, ...] = ()
    device: str = "cpu"
    bench: Mapping[str, Any] = field(default_factory=dict)
    slo_met: bool | None = None

    @classmethod
    def from_run(cls, run: Mapping[str, Any]) -> Evidence:
        """Collect it from the content of `run.json`; what is not there is left out."""
        result = run.get("result") or {}
        changes = result.get("changes") or {}
        return cls(
            summary=tuple(_summary(run, result)),
            changes={name: (pair[0], pair[1]) for name, pair in changes.items()},
            importances=dict(result.get("importances") or {}),
            trials=tuple(result.get("winner_trials") or ()),
            device=(run.get("hardware") or {}).get("device") or "cpu",
            bench=dict(result.get("winner") or {}),
            slo_met=result.get("slo_met") if run.get("slo") else None,
        )

    def of_knob(self, name: str) -> str | None:
        """One line on a tuned knob; None for a knob that was left as it was."""
        if name not in self.changes:
            return None
        line = f"default {spelled(self.changes[name][0])}"
        if (share := self.importances.get(name)) is not None:
            line += f"; {share:.0%} of what the objective varied by in the search"
        if self.trials:
            line += f"; measured in {_trials(self.trials)}"
        return line


def _summary(run: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    hardware, versions = run.get("hardware") or {}, run.get("versions") or {}
    workload = run.get("workload") or {}
    lines = []
    if command := run.get("command"):
        lines.append(f"Found by: {redacted(shlex.join(map(str, command)))}")
    if started := run.get("started_at"):
        lines.append(f"Started: {started}")
    if name := hardware.get("name"):
        cores = hardware.get("cores")
        lines.append(f"Hardware: {name}" + (f", {cores} CPU cores" if cores else ""))
    if versions:
        named = [f"{k} {versions[k]}" for k in ("autotune", "torch") if versions.get(k)]
        lines.append(f"Versions: {', '.join(named)}")
    if source := workload.get("source"):
        rate = workload.get("rate")
        rate_text = f" at {plain_number(rate)} requests/s" if isinstance(rate, (int, float)) else ""
        lines.append(f"Workload: {source}{rate_text}")
    if objective := run.get("objective"):
        slo = f" under {run['slo']}" if run.get("slo") else ""
        lines.append(f"Objective: {objective}{slo}")
    # Where the default was kept there is no other to compare it with.
    if (gain := result.get("gain")) and gain.get("confidence"):
        lines.append(_gain(gain, result))
    if verdict := result.get("verdict"):
        lines.append(f"Verdict: {verdict}")
    return lines


def _gain(gain: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    unit = "x" if gain.get("unit", "ratio") == "ratio" else ""
    line = (
        f"Gain over the default: {gain['value']:.3g}{unit}, "
        f"{gain['confidence']:.0%} interval {gain['low']:.3g}{unit} to {gain['high']:.3g}{unit}"
    )
    if winner := result.get("winner_trials"):
        line += f", {_trials(winner)}"
    if baseline := result.get("baseline_trials"):
        line += f" against {_trials(baseline)} of the default"
    return line


def _trials(numbers: Sequence[int]) -> str:
    return ("trial " if len(numbers) == 1 else "trials ") + ", ".join(map(str, numbers))


def spelled(value: Any) -> str:
    """A value as YAML spells it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
