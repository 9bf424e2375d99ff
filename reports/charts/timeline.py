"""The engine over time: queue, running sequences and occupancy of the KV cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from reports.charts.figure import Figure, line_key
from reports.charts.plot import Axis, Plot
from reports.charts.scale import domain
from reports.evidence import Evidence, Step
from reports.formatting import percent, significant

_BUCKETS = 180


def engine_timeline(evidence: Evidence) -> Figure | None:
    """Three drawings over one time axis; None where no steps were recorded."""
    sides = [side for side in evidence.sides if side.steps]
    if not sides:
        return None
    panels: list[tuple[str, str, Callable[[Step], float], bool]] = [
        ("Queue", "requests waiting", lambda s: s.queue_length, False),
        ("Batch", "sequences running", lambda s: s.running, False),
        ("KV cache", "blocks owned", _occupancy, True),
    ]
    if any(step.preemptions for side in sides for step in side.steps):
        panels.append(("Preemptions", "a step", lambda s: float(s.preemptions), False))
    drawings, rows = [], []
    longest = max(s.steps[-1].start - s.steps[0].start for s in sides) or 1.0
    for title, unit, read, share in panels:
        last = title == panels[-1][0]
        series = [(side, _buckets(side.steps, read, longest)) for side in sides]
        top = domain((y for _, points in series for _, y in points), zero=True, log=False)[1]
        plot = Plot(
            Axis("seconds since the first step" if last else "", 0.0, longest, count=10),
            Axis(unit, 0.0, top, count=3, text=percent if share else significant),
            width=960,
            height=175 if last else 155,
            bottom=44 if last else 24,
            left=66,
            title=title,
        )
        for side, points in series:
            plot.line(points, f"{side.series} thin", stepped=True)
        drawings.append(plot.render())
        for side in sides:
            values = [read(step) for step in side.steps]
            write = percent if share else significant
            mean, peak = sum(values) / len(values), max(values)
            rows.append([f"{title}, {unit}", side.label, write(mean), write(peak)])
    return Figure(
        id="timeline",
        title="The engine over time",
        caption=(
            "One measurement of each configuration; peaks within each sliver of time. A queue that "
            "only grows means that the load exceeds the capacity."
        ),
        drawings=drawings,
        columns=["Quantity", "Configuration", "Mean over steps", "Peak"],
        rows=rows,
        legend=[line_key(s.series, f"{s.label}, trial {s.steps_trial}") for s in sides],
    )


def _occupancy(step: Step) -> float:
    return step.blocks_used / step.blocks_total if step.blocks_total > 0 else 0.0


def _buckets(
    steps: Sequence[Step], read: Callable[[Step], float], longest: float
) -> list[tuple[float, float]]:
    """The peak in each bucket of time that has a step: a short stall must stay visible."""
    first = steps[0].start
    peaks: dict[int, float] = {}
    for step in steps:
        bucket = int((step.start - first) / longest * _BUCKETS)
        peaks[bucket] = max(peaks.get(bucket, 0.0), read(step))
    return [(bucket * longest / _BUCKETS, peak) for bucket, peak in sorted(peaks.items())]
