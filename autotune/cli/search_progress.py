"""A search on the terminal: what is tried, the best so far, the time left."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from autotune.records import TrialRecord
from autotune.search.events import Phase
from autotune.search.messages import QUANTIZING
from autotune.search.messages import Progress as TrialProgress

_TITLES: dict[Phase, str] = {
    "calibration": "Calibrating",
    "advice": "Advising",
    "forecast": "Simulating",
    "search": "Searching",
    "proof": "Proving",
    "done": "Done",
}

# What of findings and advice is told while the search goes on; the rest is in the report.
SHOWN_FINDINGS = 3
SHOWN_ADVICE = 5


class SearchProgress:
    """A `Listener` that draws on stderr: live on a terminal, a line a trial otherwise."""

    def __init__(self, console: Console, unit: str) -> None:
        self._console = console
        self._unit = unit
        self._phase: Phase = "calibration"
        self._count = 0
        self._total: int | None = None
        self._deadline: float | None = None
        self._now = Text()
        self._best = Text()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[load]}"),
        )
        self._task: TaskID = self._bar.add_task("", total=None, load="")
        self._live = (
            Live(get_renderable=self._render, console=console, refresh_per_second=4, transient=True)
            if console.is_terminal
            else None
        )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def phase(self, phase: Phase, seconds_left: float | None, total: int | None) -> None:
        """Show a new phase."""
        self._phase, self._count, self._total = phase, 0, total
        if seconds_left is not None:
            self._deadline = time.monotonic() + seconds_left

    def trial_started(self, number: int, source: str, changes: Mapping[str, Any]) -> None:
        """Show what is being tried."""
        self._now = Text(f"  trial {number}: {describe_changes(changes)}  ({source})")
        self._bar.update(self._task, description="  waiting", total=None, completed=0, load="")

    def progress(self, progress: TrialProgress) -> None:
        """Show how far the load is."""
        what = "layers" if progress.phase == QUANTIZING else "requests"
        of = f"{progress.finished}/{progress.total} {what}" if progress.total else ""
        self._bar.update(
            self._task,
            description=f"  {progress.phase}",
            total=progress.total or None,
            completed=progress.finished,
            load=of,
        )

    def trial_ended(self, record: TrialRecord, best: TrialRecord | None) -> None:
        """Print a line that stays, and update the best so far."""
        self._count += 1
        self._console.print(self._line(record), soft_wrap=True)
        if best is not None and best.objective is not None:
            self._best = Text(
                f"  best so far: {best.objective:.4g} {self._unit}, trial {best.number}"
            )

    def advised(
        self, findings: Sequence[Mapping[str, Any]], advice: Sequence[Mapping[str, Any]]
    ) -> None:
        """Print what the default's trial shows, and the first of what it advises."""
        severe = [f for f in findings if f["level"] != "low"]
        # One bottleneck may hurt several metrics; it is told once.
        worst = {f["bottleneck"]: f for f in reversed(severe)}
        for finding in [f for f in severe if worst[f["bottleneck"]] is f][:SHOWN_FINDINGS]:
            self._console.print(Text(f"finding      {finding['sentence']}"), soft_wrap=True)
        for item in advice[:SHOWN_ADVICE]:
            line = Text(f"advice       {item['title']}: {describe_gain(item['gain'])}")
            line.append("" if item["testable"] else "  not testable here", style="dim")
            self._console.print(line, soft_wrap=True)

    def note(self, text: str) -> None:
        """Print a note."""
        self._console.print(Text(f"note: {text}", style="dim"), soft_wrap=True)

    def _render(self) -> RenderableType:
        of = f" {self._count}/{self._total}" if self._total else ""
        head = Text(f"{_TITLES[self._phase]}{of}", style="bold")
        if self._deadline is not None:
            left = max(0.0, self._deadline - time.monotonic())
            head.append(f"  {int(left) // 60}:{int(left) % 60:02d} left", style="dim")
        return Group(head, self._now, self._bar, self._best)

    def _line(self, record: TrialRecord) -> Text:
        head = f"{record.kind:11} {record.number:3d} "
        if record.metrics is None:
            line = Text(f"{head} {record.outcome}: {record.reason}", style="yellow")
            line.append(f"  {record.source}", style="dim")
            return line
        line = Text(head)
        if record.kind == "calibration":
            line.append(f" {record.metrics['requests_per_s']:.4g} requests/s finished")
            return line
        value = "-" if record.objective is None else f"{record.objective:.4g}"
        line.append(f" {value:>9} {self._unit}  ")
        met = "SLO met   " if record.slo_met else "SLO missed"
        line.append(met, style="green" if record.slo_met else "red")
        for name in ("ttft", "tpot"):
            seconds = record.metrics[name]["p95"]
            shown = "-" if seconds is None else f"{seconds * 1e3:.4g} ms"
            line.append(f"  {name} p95 {shown:>9}")
        line.append(f"  {record.source}", style="dim")
        return line


def describe_gain(gain: Mapping[str, Any] | None) -> str:
    """A predicted gain with its interval, for instance `1.62x tpot p95 (1.3 to 2.0)`."""
    if gain is None:
        return "gain not predicted"
    metric = " ".join(filter(None, (gain["metric"], gain.get("statistic"))))
    return f"{gain['value']:.3g}x {metric} ({gain['low']:.3g} to {gain['high']:.3g}) predicted"


def describe_changes(changes: Mapping[str, Any]) -> str:
    """Knobs and values on one line; `default` if there are none."""
    return " ".join(f"{name}={str(value).lower()}" for name, value in changes.items()) or "default"
