"""Speed against quality: what each way of quantizing gains and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from autotune.records import TrialRecord
from reports.charts.figure import Figure, line_key, mark_key
from reports.charts.history import MARKS, objective_scale, objective_title
from reports.charts.labels import place_labels
from reports.charts.plot import Axis, Plot
from reports.charts.scale import domain
from reports.evidence import Evidence
from reports.formatting import MISSING, number, quantity
from reports.limits import limit_metric
from reports.quality import Variant, read_variants, written

_TITLES = {
    "quality_loss": "change of perplexity against the unquantized model (%)",
    "kl": "KL divergence from the unquantized model (nats a token)",
}
# What lies further out than so many times the widest point of interest is drawn at the edge.
_WIDEST = 3.0
_BROKEN = ("diamond", "s-missed")


@dataclass(frozen=True, slots=True)
class _Point:
    """One way of quantizing on the chart; `best` is its best trial, None if none was offered load.

    `x`, `low` and `high` are in units of the axis.
    """

    variant: Variant
    x: float
    low: float
    high: float
    best: TrialRecord | None

    @property
    def feasible(self) -> bool:
        return not self.variant.broken


def speed_against_quality(evidence: Evidence) -> Figure | None:
    """The frontier; None where fewer than two ways of quantizing were scored."""
    variants = read_variants(evidence)
    metric, bound = _axis_metric(variants)
    factor = 100.0 if metric == "quality_loss" else 1.0
    points = [p for v in variants if (p := _point(v, metric, factor, evidence)) is not None]
    if len(points) < 2:
        return None
    y_factor = objective_scale(evidence)[1]
    heights = [
        value * y_factor
        for point in points
        for trial in point.variant.trials
        if (value := number(trial.objective)) is not None
    ]
    low, high, log = domain(heights)
    if any(p.best is None for p in points) and not log:
        low -= 0.15 * (high - low)  # room for the marks on the axis below what was measured
    edge = _edge(points, None if bound is None else bound * factor)
    ends = [min(e, edge) for p in points for e in (p.x, p.low, p.high)]
    left, right, _ = domain([0.0, *ends, *([bound * factor] if bound else [])], log=False)
    plot = Plot(
        Axis(_TITLES[metric], min(left, 0.0 - (right - left) * 0.04), right),
        Axis(objective_title(evidence, log=log), low, high, log),
        width=720,
        height=360,
        left=66,
        top=26,
        right=24,
    )
    if bound is not None:
        limit = next(
            x.limit for v in variants for x in v.limits if limit_metric(x.limit)[0] == metric
        )
        plot.bar((bound * factor, low), (right, high), "s-guard", f"infeasible: breaks {limit}")
        plot.vertical(bound * factor, limit, "s-limit", above=True)
    for point in points:
        _draw_trials(plot, point, y_factor, evidence)
    front = _front(points, evidence)
    if front:
        steps = [(p.x, y * y_factor) for p, y in front]
        last = right if bound is None else bound * factor
        plot.line([*steps, (max(last, steps[-1][0]), steps[-1][1])], "s-front", stepped=True)
    labels = [_draw_point(plot, point, metric, y_factor, low, edge, evidence) for point in points]
    for x, y, text, anchor in place_labels(labels, plot.left, plot.right, plot.top, plot.bottom):
        plot.text(x, y, text, "label", anchor=anchor)
    return Figure(
        id="frontier",
        title="Speed against quality",
        caption=_caption(evidence, bound is not None),
        drawings=[plot.render()],
        columns=["Method", "Quality", "95% interval", "Best objective", "Trial", "Outcome"],
        rows=[_row(point, metric, factor, evidence) for point in points],
        layout="narrow",
        legend=_legend(points, bool(front)),
    )


def _axis_metric(variants: Sequence[Variant]) -> tuple[str, float | None]:
    """What the horizontal axis shows, and the limit on it: the first limit that has an axis."""
    for limit in (limit for variant in variants for limit in variant.limits):
        metric = limit_metric(limit.limit)[0]
        if metric in _TITLES:
            return metric, number(limit.bound)
    return "quality_loss", None


def _point(variant: Variant, metric: str, factor: float, evidence: Evidence) -> _Point | None:
    value = variant.value(metric)
    if value is None:
        return None
    low, high = variant.interval(metric) or (value, value)
    measured = [t for t in variant.trials if number(t.objective) is not None]
    met = [t for t in measured if t.slo_met] or measured
    best = None
    for trial in met:
        if best is None or evidence.better(_objective(trial), _objective(best)):
            best = trial
    return _Point(variant, value * factor, low * factor, high * factor, best)


def _objective(trial: TrialRecord) -> float:
    value = number(trial.objective)
    assert value is not None
    return value


def _edge(points: Sequence[_Point], bound: float | None) -> float:
    """Where the axis ends, so that one broken method does not press all others into a corner."""
    near = [p.high for p in points if p.feasible and p.best] + ([bound] if bound else [])
    return _WIDEST * max(near) if near and max(near) > 0 else max(p.x for p in points)


def _front(points: Sequence[_Point], evidence: Evidence) -> list[tuple[_Point, float]]:
    """Points that no other beats in both quality and objective, by falling quality."""
    allowed = [p for p in points if p.feasible and p.best is not None and p.best.slo_met]
    front: list[tuple[_Point, float]] = []
    for point in sorted(allowed, key=lambda p: p.x):
        assert point.best is not None
        value = _objective(point.best)
        if not front or evidence.better(value, front[-1][1]):
            front.append((point, value))
    return front


def _draw_trials(plot: Plot, point: _Point, factor: float, evidence: Evidence) -> None:
    """The other trials of a way of quantizing, small: they differ in other knobs."""
    unit = str(evidence.run.get("objective_unit", ""))
    for trial in point.variant.trials:
        value = number(trial.objective)
        if value is not None and trial is not point.best:
            shape, series = MARKS["met" if trial.slo_met else "missed"]
            tip = f"trial {trial.number}, {point.variant.name}: {quantity(value, unit)}"
            plot.mark(point.x, value * factor, shape, f"{series} faint", tip, size=3)


def _draw_point(
    plot: Plot,
    point: _Point,
    metric: str,
    factor: float,
    floor: float,
    edge: float,
    evidence: Evidence,
) -> tuple[float, float, str]:
    """Mark a way of quantizing with its interval; returns its label and where that belongs."""
    unit = str(evidence.run.get("objective_unit", ""))
    value = None if point.best is None else _objective(point.best)
    y = floor if value is None else value * factor
    shape, series = MARKS["met"] if _holds(point) else MARKS["missed"]
    if not point.feasible:
        shape, series = _BROKEN
    plot.line([(point.low, y), (point.high, y)], f"{series} whisker")
    told = "no load was offered" if value is None else quantity(value, unit)
    quality = written(metric, point.variant.value(metric))
    plot.mark(point.x, y, shape, series, f"{point.variant.name}: {quality}, {told}", size=6)
    beyond = f" → {quality}" if point.x > edge else ""
    return plot.x(point.x), plot.y(y), point.variant.name + beyond


def _holds(point: _Point) -> bool:
    return point.best is not None and point.best.slo_met


def _caption(evidence: Evidence, guarded: bool) -> str:
    text = (
        "The best trial of each way of quantizing, small marks its other trials; bars are 95% "
        f"intervals of the quality. Further left is closer to the unquantized model, "
        f"{'lower' if evidence.minimize else 'higher'} is better."
    )
    if guarded:
        text += (
            " What lies in the shaded part breaks the limit on the quality: it cannot be chosen, "
            "and where no load was offered its mark stands on the axis."
        )
    return text


def _legend(points: Sequence[_Point], front: bool) -> list[tuple[Markup, str]]:
    legend = []
    if any(_holds(p) and p.feasible for p in points):
        legend.append(mark_key(*MARKS["met"], "SLO met"))
    if any(p.feasible and not _holds(p) for p in points):
        legend.append(mark_key(*MARKS["missed"], "SLO missed"))
    if any(not p.feasible for p in points):
        legend.append(mark_key(*_BROKEN, "breaks a limit on the quality"))
    if front:
        legend.append(line_key("s-front", "frontier: nothing is both better and closer"))
    return legend


def _row(point: _Point, metric: str, factor: float, evidence: Evidence) -> list[str]:
    unit = str(evidence.run.get("objective_unit", ""))
    ends = point.low / factor, point.high / factor
    outcome = "SLO met" if _holds(point) else "SLO missed"
    if not point.feasible:
        outcome = "breaks " + ", ".join(limit.limit for limit in point.variant.broken)
    return [
        point.variant.name,
        written(metric, point.x / factor),
        f"{written(metric, ends[0])} to {written(metric, ends[1])}",
        MISSING if point.best is None else quantity(_objective(point.best), unit),
        MISSING if point.best is None else str(point.best.number),
        outcome,
    ]
