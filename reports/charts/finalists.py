"""The finalists' gains over the default, with their intervals."""

from __future__ import annotations

from reports.charts.figure import Figure, mark_key
from reports.charts.history import KEYS, MARKS
from reports.charts.plot import Axis, Plot
from reports.charts.scale import domain
from reports.evidence import Evidence, as_interval
from reports.formatting import MISSING, fixed, mapping, number, sequence
from reports.verdict import changes_of


def finalist_gains(evidence: Evidence) -> Figure | None:
    """The finalists' gains with their intervals against 1, the default; None without finalists."""
    finalists = []
    for item in map(mapping, sequence(evidence.result.get("finalists"))):
        gain = mapping(item.get("gain"))
        value, ends = number(gain.get("value")), as_interval([gain.get("low"), gain.get("high")])
        # Gains as differences have another unit and scale; the table of trials shows those.
        if value is not None and gain.get("unit") != "difference":
            names = ", ".join(f"{c.knob}={c.after}" for c in changes_of(item.get("changes")))
            finalists.append((names or "default", value, ends, item.get("slo_met") is True))
    if not finalists:
        return None
    rows = len(finalists)
    spread = [1.0] + [v for _, value, ends, _ in finalists for v in (value, *(ends or ()))]
    low, high, log = domain(spread)
    labels = [(rows - 1 - i, f"finalist {i + 1}") for i in range(rows)]
    plot = Plot(
        Axis("gain over the default (ratio, with its interval)", low, high, log),
        Axis("", -0.6, rows - 0.4, ticks=labels),
        width=720,
        height=82 + 34 * rows,
        left=110,
        top=24,
    )
    plot.vertical(1.0, "default", "s-default", above=True)
    for index, (names, value, ends, met) in enumerate(finalists):
        row = rows - 1 - index
        if ends:
            plot.line([(ends[0], row), (ends[1], row)], "s-winner interval")
        shape = MARKS["met" if met else "missed"]
        plot.mark(value, row, *shape, f"finalist {index + 1}: {fixed(value)}×, {names}", size=6)
    return Figure(
        id="finalists",
        title="Finalists in the proof",
        caption=(
            "Gain of each finalist, measured again in rounds interleaved with the default. An "
            "interval that reaches 1 proves nothing."
        ),
        drawings=[plot.render()],
        columns=["Finalist", "Changes", "Gain", "Interval", "SLO"],
        rows=[
            [
                str(i + 1),
                names,
                f"{fixed(value)}×",
                f"{fixed(ends[0])}–{fixed(ends[1])}" if ends else MISSING,
                "met" if met else "missed",
            ]
            for i, (names, value, ends, met) in enumerate(finalists)
        ],
        layout="narrow",
        legend=[mark_key(*MARKS[k], KEYS[k]) for k in ("met", "missed")],
    )
