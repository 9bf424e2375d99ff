"""Acceptance by position: how many drafts were right up to each of their tokens."""

from __future__ import annotations

from collections.abc import Sequence

from reports.charts.figure import Figure, mark_key
from reports.charts.plot import Axis, Plot
from reports.charts.series import SERIES
from reports.formatting import percent, significant
from reports.speculation import Drafts

_MOST_POSITIONS = 16


MEASURED = (
    "The upright lines are 95% intervals that know of runs: drafts that are right come together."
)
SIMULATED = "The upright lines are the 90% intervals of the draws."


def acceptance_by_position(drafts: Sequence[Drafts], intervals: str = MEASURED) -> Figure | None:
    """A line for each that drafted; None where nobody did. `intervals` says what they are."""
    shown = [item for item in drafts if item.positions][: len(SERIES)]
    if not shown:
        return None
    last = min(_MOST_POSITIONS, max(p.position for item in shown for p in item.positions))
    plot = Plot(
        Axis(
            "position in the draft",
            0.5,
            last + 0.5,
            ticks=[(place, str(place)) for place in range(1, last + 1)],
        ),
        Axis(
            "accepted, of the drafts that reach it",
            0.0,
            1.02,
            ticks=[(q / 4, f"{q * 25}%") for q in range(5)],
        ),
        height=300,
    )
    rows = []
    for place, item in enumerate(shown):
        shape, series = SERIES[place]
        # Beside each other, so that no interval hides another.
        aside = 0.12 * (place - (len(shown) - 1) / 2)
        positions = [p for p in item.positions if p.position <= last]
        plot.line([(p.position + aside, p.share.value) for p in positions], f"{series} thin")
        for p in positions:
            at = p.position + aside
            if p.share.spread:
                plot.line([(at, p.share.low), (at, p.share.high)], f"{series} whisker")
            tip = f"{item.label}, position {p.position}: {p.share.written(percent, '%')}"
            if p.drafted is not None:
                tip += f", {significant(p.accepted, 9)} of {significant(p.drafted, 9)}"
            plot.mark(at, p.share.value, shape, series, tip)
            rows.append(
                [
                    _name(item),
                    str(p.position),
                    significant(p.drafted, 9),
                    significant(p.accepted, 9),
                    p.share.written(percent, "%"),
                ]
            )
    return Figure(
        id="acceptance",
        title="Acceptance by position",
        caption=(
            "Of the drafts that had a token at a position, the share that was right there and "
            f"before. {intervals}"
        ),
        drawings=[plot.render()],
        columns=["Drafts", "Position", "Drafted", "Accepted", "Share (interval)"],
        rows=rows,
        layout="narrow",
        legend=[mark_key(*SERIES[i], _name(item)) for i, item in enumerate(shown)],
    )


def _name(item: Drafts) -> str:
    return f"{item.label}: {item.how}" if item.how else item.label
