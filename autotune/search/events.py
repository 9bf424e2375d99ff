"""What a search tells whoever watches it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from autotune.records import TrialRecord
from autotune.search.messages import Progress

Phase = Literal["calibration", "advice", "forecast", "search", "proof", "done"]


class Listener(Protocol):
    """Told as things happen, from the thread that called `tune`."""

    def phase(self, phase: Phase, seconds_left: float | None, total: int | None) -> None:
        """A phase begins; with the time left in all and its number of trials, where known."""

    def trial_started(self, number: int, source: str, changes: Mapping[str, Any]) -> None:
        """A trial begins; `changes` are its differences from the default config."""

    def progress(self, progress: Progress) -> None:
        """The trial under way got on."""

    def trial_ended(self, record: TrialRecord, best: TrialRecord | None) -> None:
        """A trial ended and is on disk; `best` is the best search trial so far."""

    def advised(
        self, findings: Sequence[Mapping[str, Any]], advice: Sequence[Mapping[str, Any]]
    ) -> None:
        """What the default's trial shows, and what it advises; as in the files of the run."""

    def note(self, text: str) -> None:
        """Something the user should know."""


@dataclass(slots=True)
class Silent:
    """A listener that shows nothing and keeps the notes."""

    notes: list[str] = field(default_factory=list)

    def phase(self, phase: Phase, seconds_left: float | None, total: int | None) -> None:
        """Ignored."""

    def trial_started(self, number: int, source: str, changes: Mapping[str, Any]) -> None:
        """Ignored."""

    def progress(self, progress: Progress) -> None:
        """Ignored."""

    def trial_ended(self, record: TrialRecord, best: TrialRecord | None) -> None:
        """Ignored."""

    def advised(
        self, findings: Sequence[Mapping[str, Any]], advice: Sequence[Mapping[str, Any]]
    ) -> None:
        """Ignored."""

    def note(self, text: str) -> None:
        """Keep a note."""
        self.notes.append(text)
