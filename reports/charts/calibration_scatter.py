"""Predicted against measured, a drawing a metric: on the diagonal is what came true."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from reports.charts.figure import Figure, line_key, mark_key
from reports.charts.plot import Axis, Plot
from reports.charts.scale import domain
from reports.formatting import percent
from reports.predictions import Pair, by_metric

_MOST_DRAWINGS = 6
_MOST_POINTS = 400
_HELD, _OUTSIDE = ("circle", "s-met"), ("triangle", "s-missed")
# Before further metrics, what an SLO is mostly on.
_FIRST = (
    "objective",
    "ttft.p95",
    "tpot.p95",
    "e2e.p95",
    "output_tokens_per_s",
    "goodput_requests_per_s",
    "ttft.mean",
    "tpot.mean",
)


def calibration_scatter(pairs: Sequence[Pair]) -> Figure | None:
    """Small drawings with a shared legend; None where nothing was both predicted and measured."""
    if not pairs:
        return None
    groups = by_metric(pairs)
    order = [m for m in _FIRST if m in groups] + [m for m in groups if m not in _FIRST]
    shown = [groups[metric][:_MOST_POINTS] for metric in order[:_MOST_DRAWINGS]]
    return Figure(
        id="calibration",
        title="Predicted against measured",
        caption=(
            "Each trial once in every drawing, predicted before it was measured. On the diagonal "
            "the prediction came true; the upright lines are its 90% interval, and a triangle "
            "marks a measurement outside it."
        ),
        drawings=[_drawing(group) for group in shown],
        columns=["Trial", "Metric", "Predicted (90% interval)", "Measured", "Error", "Held"],
        rows=[
            [
                str(pair.trial.number),
                pair.title,
                pair.predicted.written(pair.written),
                pair.written(pair.measured),
                percent(pair.error),
                "yes" if pair.held else "no",
            ]
            for group in shown
            for pair in group[:100]
        ],
        layout="small",
        legend=[
            mark_key(*_HELD, "within the interval"),
            mark_key(*_OUTSIDE, "outside it"),
            line_key("s-default", "predicted = measured"),
        ],
    )


def _drawing(group: Sequence[Pair]) -> Markup:
    factor = 1000.0 if group[0].unit == "s" else 1.0
    unit = "ms" if group[0].unit == "s" else group[0].unit
    values = [
        factor * value
        for pair in group
        for value in (pair.measured, pair.predicted.value, pair.predicted.low, pair.predicted.high)
    ]
    # Intervals that reach towards zero must not stretch a logarithmic axis without end.
    least = min(factor * min(p.measured, p.predicted.value) for p in group)
    low, high, log = domain([max(v, least / 3) for v in values] if least > 0 else values)
    scale = f"{unit}, log scale" if log else unit
    plot = Plot(
        Axis(f"measured ({scale})".replace(" ()", ""), low, high, log, count=4),
        Axis("predicted", low, high, log, count=4),
        width=330,
        height=300,
        left=62,
        top=24,
        title=group[0].title,
    )
    plot.line([(low, low), (high, high)], "s-default thin")
    for pair in group:
        shape, series = _HELD if pair.held else _OUTSIDE
        at, predicted = factor * pair.measured, pair.predicted.times(factor)
        if predicted.spread:
            plot.line([(at, predicted.low), (at, predicted.high)], f"{series} whisker")
        tip = (
            f"trial {pair.trial.number}: {pair.title} predicted "
            f"{pair.predicted.written(pair.written)}, measured {pair.written(pair.measured)}"
        )
        plot.mark(at, predicted.value, shape, series, tip, size=4)
    return plot.render()
