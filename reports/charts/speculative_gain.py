"""What drafts are worth by load: the speed-up of decoding, predicted and measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from reports.charts.figure import Figure, mark_key
from reports.charts.plot import Axis, Plot
from reports.charts.scale import domain
from reports.charts.series import SERIES
from reports.estimate import Estimate
from reports.formatting import MISSING, fixed, significant
from reports.speculation import Drafts, Load


@dataclass(frozen=True, slots=True)
class _Series:
    """One way of knowing the speed-up of one that drafts, by load."""

    title: str
    shape: str
    colour: str
    measured: bool
    points: Sequence[tuple[Load, Estimate]]


def speculative_gain(drafts: Sequence[Drafts]) -> Figure | None:
    """Points for what was measured, lines for what was predicted; None where neither is known."""
    series = [s for place, item in enumerate(drafts[: len(SERIES)]) for s in _series(place, item)]
    if not series:
        return None
    loads = sorted({load.sequences for s in series for load, _ in s.points})
    values = [v for s in series for _, e in s.points for v in (e.value, e.low, e.high)]
    # A wide interval must not press everything else into a corner.
    most = max(2.0, 1.6 * max(e.value for s in series for _, e in s.points))
    low, high, _ = domain([1.0, *(min(v, most) for v in values)], log=False)
    first, last = math.log2(loads[0]), math.log2(loads[-1])
    doublings = range(math.floor(first), math.ceil(last) + 1)
    plot = Plot(
        Axis(
            "sequences that decode in a step (log scale)",
            first - 0.3,
            last + 0.3,
            ticks=[(q, str(2**q)) for q in doublings if first - 0.3 <= q <= last + 0.3],
        ),
        Axis("times as fast as without drafts", low, high),
        height=300,
    )
    plot.horizontal(1.0, "no gain", "s-limit")
    rows = []
    for place, s in enumerate(series):
        # Beside each other, so that no interval hides another.
        aside = 0.05 * (place - (len(series) - 1) / 2)
        points = [(math.log2(load.sequences) + aside, load, gain) for load, gain in s.points]
        if not s.measured:
            plot.line([(x, gain.value) for x, _, gain in points], f"{s.colour} thin")
        for x, load, gain in points:
            if gain.spread:
                plot.line([(x, gain.low), (x, gain.high)], f"{s.colour} whisker")
            tip = f"{s.title}: {gain.written(fixed)} with {significant(load.sequences)} sequences"
            plot.mark(x, gain.value, s.shape, s.colour, tip, size=5.5 if s.measured else 3.2)
            rows.append(_row(s, load, gain))
    return Figure(
        id="speculative-gain",
        title="Speed-up by load",
        caption=(
            "How many times as many tokens decoding yields in the same time. Measured: steps with "
            "drafts against steps of as many sequences without, large marks with 95% intervals. "
            "Predicted: the fitted cost of a step with and without the drafted tokens, small marks "
            "joined by lines; their intervals are the cost’s error."
        ),
        drawings=[plot.render()],
        columns=["Drafts", "Sequences", "Drafted for each", "Tokens a step", "Speed-up", "Steps"],
        rows=rows,
        layout="narrow",
        legend=[mark_key(s.shape, s.colour, s.title) for s in series],
    )


def _series(place: int, item: Drafts) -> list[_Series]:
    """Measured and predicted ones of one that drafts, as far as there are any."""
    shape, colour = SERIES[place]
    measured = [(load, load.measured) for load in item.loads if load.measured is not None]
    predicted = [(load, load.predicted) for load in item.loads if load.predicted is not None]
    # A single measurement has no name of its own.
    who = "" if item.label == "measured" else f"{item.label}, "
    found = []
    if measured:
        found.append(_Series(f"{who}measured", shape, colour, True, measured))
    if predicted:
        found.append(_Series(f"{who}predicted", "diamond", colour, False, predicted))
    return found


def _row(series: _Series, load: Load, gain: Estimate) -> list[str]:
    return [
        series.title,
        significant(load.sequences),
        significant(load.num_tokens),
        fixed(load.tokens_per_step),
        gain.written(fixed),
        MISSING if load.steps is None or not series.measured else significant(load.steps, 9),
    ]
