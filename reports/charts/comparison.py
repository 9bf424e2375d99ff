"""Throughput and goodput of the default beside the winner, with every repetition shown."""

from __future__ import annotations

from markupsafe import Markup

from reports.charts.figure import Figure, mark_key
from reports.charts.plot import Axis, Plot
from reports.charts.scale import domain
from reports.evidence import Evidence, Side, as_interval
from reports.formatting import MISSING, mapping, number, percent, significant

_METRICS = {
    "goodput_requests_per_s": ("Goodput", "requests/s"),
    "requests_per_s": ("Finished requests", "requests/s"),
    "output_tokens_per_s": ("Output", "tokens/s"),
    "slo_attainment": ("Requests that met every limit", "share"),
}
_CAPTION = (
    "Large marks are all rounds of the proof pooled, small ones single rounds; the line is the 95% "
    "interval where the records hold one, else the range of the rounds. Further right is better."
)
_SHAPES = {"s-default": "square", "s-winner": "circle"}


def throughput_comparison(evidence: Evidence) -> Figure | None:
    """One drawing a metric; None where nothing was measured."""
    drawings, rows = [], []
    for key, (name, unit) in _METRICS.items():
        sides = [side for side in evidence.sides if number(side.bench.get(key)) is not None]
        if sides:
            drawings.append(_drawing(sides, key, name, unit))
            rows += [_row(side, key, name, unit) for side in sides]
    if not drawings:
        return None
    return Figure(
        id="throughput",
        title="Rates",
        caption=_CAPTION if evidence.result else "Single measurements. Further right is better.",
        drawings=drawings,
        columns=["Metric", "Configuration", "Pooled", "Interval or range", "Single rounds"],
        rows=rows,
        layout="pairs",
        legend=[mark_key(_SHAPES[s.series], s.series, s.label) for s in evidence.sides],
    )


def _rounds(side: Side, key: str) -> list[float]:
    values = (number(mapping(trial.metrics).get(key)) for trial in side.trials)
    return [value for value in values if value is not None]


def _range(side: Side, key: str) -> tuple[float, float, str] | None:
    interval = as_interval(mapping(side.bench.get("intervals")).get(key))
    if interval is not None:
        return *interval, "95% interval"
    rounds = _rounds(side, key)
    return (min(rounds), max(rounds), "range") if len(rounds) > 1 else None


def _text(value: float | None, unit: str) -> str:
    return percent(value) if unit == "share" else significant(value)


def _row(side: Side, key: str, name: str, unit: str) -> list[str]:
    spread = _range(side, key)
    return [
        name if unit == "share" else f"{name} ({unit})",
        side.label,
        _text(number(side.bench.get(key)), unit),
        f"{_text(spread[0], unit)}–{_text(spread[1], unit)} ({spread[2]})" if spread else MISSING,
        ", ".join(_text(v, unit) for v in _rounds(side, key)) or MISSING,
    ]


def _drawing(sides: list[Side], key: str, name: str, unit: str) -> Markup:
    values = [v for s in sides for v in [number(s.bench.get(key)) or 0.0, *_rounds(s, key)]]
    values += [end for s in sides if (spread := _range(s, key)) for end in spread[:2]]
    low, high, _ = domain(values, zero=True, log=False)
    share = unit == "share"
    label = "% of requests" if share else unit
    placed = [(len(sides) - 1 - i, side) for i, side in enumerate(sides)]
    ticks = [(q / 100, f"{q}%") for q in (0, 25, 50, 75, 100)] if share else None
    plot = Plot(
        Axis(
            label,
            low,
            1.0 if share else high,
            ticks=ticks,
        ),
        Axis("", -0.6, len(sides) - 0.4, ticks=[(row, s.label) for row, s in placed]),
        height=150,
        left=84,
        title=name,
    )
    for row, side in placed:
        spread = _range(side, key)
        if spread:
            plot.line([(spread[0], row), (spread[1], row)], f"{side.series} interval")
        rounds = _rounds(side, key)
        for index, value in enumerate(rounds if len(rounds) > 1 else ()):
            tip = f"{side.label}, round {index + 1}: {_text(value, unit)} {'' if share else unit}"
            plot.mark(value, row - 0.27, _SHAPES[side.series], f"{side.series} faint", tip, size=3)
        pooled = number(side.bench.get(key))
        if pooled is not None:
            tip = f"{side.label}: {_text(pooled, unit)} {'' if share else unit}"
            plot.mark(pooled, row, _SHAPES[side.series], side.series, tip, size=6)
    return plot.render()
