"""Cost against latency: every option of a plan, and those that nothing beats in both."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from reports.charts.figure import Figure, line_key, mark_key
from reports.charts.labels import place_labels
from reports.charts.plot import Axis, Plot
from reports.charts.scale import domain
from reports.estimate import Estimate
from reports.formatting import MISSING, milliseconds, significant
from reports.plan.evidence import Option, Plan
from reports.plan.money import chance, dollars

_MARKS = {"met": ("circle", "s-met"), "missed": ("triangle", "s-missed")}
_CHOSEN = ("diamond", "s-chosen")
_MOST_SHOWN = 200
# What costs more than so many times the cheapest that keeps the promise is not drawn: it would
# press every option that may be chosen into a corner.
_DEAREST = 4.0
_SPREAD_FOR_LOG = 6.0
_MOST_LABELS = 9


def cost_frontier(plan: Plan) -> Figure | None:
    """A drawing a latency of the promise; None where no option has both price and latency."""
    drawings = []
    for metric, statistic, bound in plan.axes:
        points = _points(plan, metric, statistic)
        if points:
            drawings.append(_drawing(plan, points, metric, statistic, bound))
    if not drawings:
        return None
    shown = [option for option, _, _ in _points(plan, *plan.axes[0][:2])]
    legend = [(_CHOSEN, "recommended")] if plan.recommended in shown else []
    for standing, text in (("met", "keeps the promise"), ("missed", "does not, surely enough")):
        if any(o.standing == standing and o is not plan.recommended for o in shown):
            legend.append((_MARKS[standing], text))
    keys = [mark_key(*mark, text) for mark, text in legend]
    if any(o.standing == "met" for o in shown):
        keys.append(line_key("s-front", "frontier: nothing is both cheaper and faster"))
    if any(bound is not None for _, _, bound in plan.axes):
        keys.append(line_key("s-limit", "limit of the promise"))
    return Figure(
        id="cost-frontier",
        title="Cost against latency",
        caption=(
            "Every option with the replicas it needs: in full colour what was simulated, pale what "
            "arithmetic alone judged. Further left is cheaper, lower is faster; the upright lines "
            "are 90% intervals of the latency." + _left_out(plan)
        ),
        drawings=drawings,
        columns=["Option", *(f"{m.upper()} {s}" for m, s, _ in plan.axes), "$ a month", "Chance"],
        rows=[_row(plan, option) for option in shown],
        layout="pairs",
        legend=keys,
    )


def _points(plan: Plan, metric: str, statistic: str) -> list[tuple[Option, float, Estimate]]:
    """(option, USD a month, latency) of what has both, at most `_MOST_SHOWN` of them."""
    dearest = _dearest(plan)
    found = [
        (option, cost.value, latency)
        for option in plan.options
        if option.standing != "failed"
        and (cost := option.per_month) is not None
        and 0 < cost.value <= dearest
        and (latency := option.latency(metric, statistic)) is not None
        and latency.value > 0
    ]
    return found[:_MOST_SHOWN]


def _dearest(plan: Plan) -> float:
    """The highest monthly cost that is drawn."""
    kept = [o.per_month.value for o in plan.options if o.standing == "met" and o.per_month]
    return _DEAREST * min(kept) if kept and min(kept) > 0 else float("inf")


def _left_out(plan: Plan) -> str:
    dearest = _dearest(plan)
    count = sum(1 for o in plan.options if o.per_month and o.per_month.value > dearest)
    if not count:
        return ""
    options = "1 option" if count == 1 else f"{count} options"
    return f" {options} above {dollars(dearest)} a month left out."


def _front(
    points: Sequence[tuple[Option, float, Estimate]],
) -> list[tuple[Option, float, Estimate]]:
    """Of those that keep the promise, what no other beats in both, by rising cost."""
    front: list[tuple[Option, float, Estimate]] = []
    kept = [point for point in points if point[0].standing == "met"]
    for point in sorted(kept, key=lambda p: (p[1], p[2].value)):
        if not front or point[2].value < front[-1][2].value:
            front.append(point)
    return front


def _drawing(
    plan: Plan,
    points: Sequence[tuple[Option, float, Estimate]],
    metric: str,
    statistic: str,
    bound: float | None,
) -> Markup:
    heights = [1000 * v for _, _, e in points for v in (e.value, max(e.low, e.value / 20), e.high)]
    # What misses a limit by far must not press everything that meets it onto the axis.
    shown = [min(h, _ceiling(bound)) for h in heights] + ([] if bound is None else [1000 * bound])
    wide_spread = min(shown) > 0 and max(shown) > _SPREAD_FOR_LOG * min(shown)
    low, high, log = domain(shown, log=True if wide_spread else None)
    left, right, wide = domain([cost for _, cost, _ in points])
    unit = "ms, log scale" if log else "ms"
    plot = Plot(
        Axis("$ a month, log scale" if wide else "$ a month", left, right, wide, text=_compact),
        Axis(f"{metric.upper()} {statistic} ({unit})", low, high, log),
        height=330,
        left=66,
        title=f"{metric.upper()} {statistic}",
    )
    front = _front(points)
    if bound is not None:
        plot.bar((left, min(1000 * bound, high)), (right, high), "s-guard", "breaks the limit")
        plot.horizontal(1000 * bound, f"limit {milliseconds(bound)}", "s-limit")
    if front:
        steps = [(cost, 1000 * e.value) for _, cost, e in front]
        plot.line([*steps, (right, steps[-1][1])], "s-front", stepped=True)
    named = {id(o) for o in plan.best_of_each} | {id(o) for o, _, _ in front[:3]}
    # The recommended mark comes last: it must not be hidden.
    for option, cost, latency in sorted(points, key=lambda p: p[0] is plan.recommended):
        chosen = option is plan.recommended
        shape, series = _CHOSEN if chosen else _MARKS[option.standing]
        prominent = chosen or id(option) in named
        if latency.spread:
            ends = [(cost, 1000 * latency.low), (cost, 1000 * latency.high)]
            plot.line(ends, f"{series} whisker{'' if prominent else ' faint'}")
        tip = (
            f"{option.short}: {dollars(cost)} a month, {metric.upper()} {statistic} "
            f"{latency.written(milliseconds, 'ms')}, chance {chance(option.chance)}"
        )
        size = 7.0 if chosen else 5.0 if prominent else 4.0 if option.simulated else 3.2
        mark_series = series if option.simulated else f"{series} faint"
        plot.mark(cost, 1000 * latency.value, shape, mark_series, tip, size=size)
    labels = [
        (plot.x(cost), plot.y(1000 * latency.value), option.short)
        for option, cost, latency in sorted(points, key=lambda p: p[0] is not plan.recommended)
        if id(option) in named
    ][:_MOST_LABELS]
    for x, y, text, anchor in place_labels(labels, plot.left, plot.right, plot.top, plot.bottom):
        plot.text(x, y, text, "label", anchor=anchor)
    return plot.render()


def _ceiling(bound: float | None) -> float:
    """The highest latency in milliseconds that is drawn in its place; what is later is clamped."""
    return float("inf") if bound is None else 5000 * bound


def _compact(value: float) -> str:
    """Dollars on an axis."""
    return f"${significant(value / 1000)}k" if value >= 1000 else f"${significant(value)}"


def _row(plan: Plan, option: Option) -> list[str]:
    latencies = [option.latency(metric, statistic) for metric, statistic, _ in plan.axes]
    cost = option.per_month
    return [
        option.short,
        *(MISSING if e is None else e.written(milliseconds, "ms") for e in latencies),
        MISSING if cost is None else dollars(cost.value),
        chance(option.chance),
    ]
