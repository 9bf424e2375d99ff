"""Predicted against measured gain of each piece of advice that the search tried."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reports.advice import knobs_text, metric_name
from reports.charts.figure import Figure, line_key, mark_key
from reports.charts.plot import Axis, Plot
from reports.charts.scale import domain
from reports.evidence import as_interval
from reports.formatting import MISSING, fixed, mapping, number, percent, sequence

_VERDICTS = {True: "hit", False: "miss", None: MISSING}


@dataclass(frozen=True, slots=True)
class _Entry:
    title: str
    metric: str
    predicted: float
    interval: tuple[float, float] | None
    measured: float | None
    measured_interval: tuple[float, float] | None
    held: bool | None
    direction: bool | None


def scoreboard_figure(scoreboard: Mapping[str, Any]) -> Figure | None:
    """A row a piece of advice; None where none was scored."""
    entries = [e for e in map(_entry, sequence(scoreboard.get("entries"))) if e is not None]
    if not entries:
        return None
    count = len(entries)
    spread = [1.0]
    for entry in entries:
        spread += [entry.predicted, *(entry.interval or ()), *(entry.measured_interval or ())]
        spread += [] if entry.measured is None else [entry.measured]
    low, high, log = domain(spread)
    labels = [(count - 1 - i, _short(entry.title)) for i, entry in enumerate(entries)]
    plot = Plot(
        Axis("gain over the default (above 1 is better)", low, high, log),
        Axis("", -0.6, count - 0.4, ticks=labels),
        width=820,
        height=82 + 34 * count,
        left=250,
        top=24,
    )
    plot.vertical(1.0, "no change", "s-default", above=True)
    for index, entry in enumerate(entries):
        row = count - 1 - index
        if entry.interval:
            plot.line(
                [(entry.interval[0], row + 0.12), (entry.interval[1], row + 0.12)],
                "s-default interval",
            )
        tip = f"{entry.title}: {fixed(entry.predicted)}× of {entry.metric} predicted"
        plot.mark(entry.predicted, row + 0.12, "square", "s-default", tip, size=5)
        if entry.measured is None:
            continue
        if entry.measured_interval:
            ends = entry.measured_interval
            plot.line([(ends[0], row - 0.16), (ends[1], row - 0.16)], "s-winner interval")
        tip = f"{entry.title}: {fixed(entry.measured)}× of {entry.metric} measured"
        series = "s-winner" if entry.held is not False else "s-missed"
        plot.mark(entry.measured, row - 0.16, "circle", series, tip, size=5.5)
    return Figure(
        id="scoreboard",
        title="Predicted and measured",
        caption=_caption(scoreboard),
        drawings=[plot.render()],
        columns=["Advice", "Metric", "Predicted", "Interval", "Measured", "Held", "Direction"],
        rows=[_row(entry) for entry in entries],
        layout="narrow",
        legend=[
            line_key("s-default interval", "predicted, 90% interval"),
            mark_key("circle", "s-winner", "measured, within it"),
            mark_key("circle", "s-missed", "measured, outside it"),
        ],
    )


def _entry(value: object) -> _Entry | None:
    item = mapping(value)
    predicted, measured = mapping(item.get("predicted")), mapping(item.get("measured"))
    gain = number(predicted.get("value"))
    if gain is None or gain <= 0:
        return None
    title = str(item.get("title") or knobs_text(item.get("knobs")) or item.get("technique") or "")
    held, direction = item.get("held"), item.get("direction_right")
    return _Entry(
        title=title,
        metric=metric_name(
            {**predicted, **{k: item[k] for k in ("metric", "statistic") if k in item}}
        ),
        predicted=gain,
        interval=as_interval([predicted.get("low"), predicted.get("high")]),
        measured=number(measured.get("value")),
        measured_interval=as_interval([measured.get("low"), measured.get("high")]),
        held=held if isinstance(held, bool) else None,
        direction=direction if isinstance(direction, bool) else None,
    )


def _caption(scoreboard: Mapping[str, Any]) -> str:
    parts = ["Each piece of advice that the search measured by itself, against the default."]
    held, scored = number(scoreboard.get("held_share")), number(scoreboard.get("scored"))
    if scored:
        parts.append(f"{scored:g} scored;")
        if held is not None:
            parts.append(f"intervals held for {percent(held)},")
        right = number(scoreboard.get("direction_share"))
        if right is not None:
            parts.append(f"the direction was right for {percent(right)},")
        error = number(scoreboard.get("median_error"))
        if error is not None:
            parts.append(f"the median error was {percent(error)}.")
    text = " ".join(parts)
    return text if text.endswith(".") else text.rstrip(",;") + "."


def _row(entry: _Entry) -> list[str]:
    ends = entry.interval
    return [
        entry.title,
        entry.metric,
        f"{fixed(entry.predicted)}×",
        MISSING if ends is None else f"{fixed(ends[0])}–{fixed(ends[1])}",
        MISSING if entry.measured is None else f"{fixed(entry.measured)}×",
        _VERDICTS[entry.held],
        MISSING if entry.direction is None else "right" if entry.direction else "wrong",
    ]


def _short(title: str) -> str:
    return title if len(title) <= 34 else title[:33] + "…"
