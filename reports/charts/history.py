"""The search in the order in which it happened: each trial's objective and the best so far."""

from __future__ import annotations

from collections.abc import Sequence

from reports.charts.figure import Figure, line_key, mark_key
from reports.charts.plot import Axis, Plot
from reports.charts.scale import domain
from reports.evidence import Evidence
from reports.formatting import number, quantity
from reports.trials import outcome_of, outcome_text, shown

# What a mark means is told by its shape: the colour only repeats it.
MARKS = {
    "met": ("circle", "s-met"),
    "missed": ("triangle", "s-missed"),
    "failed": ("cross", "s-failed"),
}
KEYS = {"met": "SLO met", "missed": "SLO missed", "failed": "failed, nothing measured"}


def objective_scale(evidence: Evidence) -> tuple[str, float]:
    """The objective's unit on the page and the factor from the records' unit to it."""
    unit = str(evidence.run.get("objective_unit", ""))
    return ("ms", 1000.0) if unit in ("s", "seconds") else (unit, 1.0)


def objective_title(evidence: Evidence, *, log: bool = False) -> str:
    """The objective with its unit, as an axis is titled."""
    inside = ", ".join(filter(None, (objective_scale(evidence)[0], "log scale" if log else "")))
    name = str(evidence.run.get("objective", "objective"))
    return f"{name} ({inside})" if inside else name


def search_history(evidence: Evidence) -> Figure | None:
    """Objective by trial; None where the search has not ended a trial."""
    trials = evidence.search_trials
    if not trials:
        return None
    factor = objective_scale(evidence)[1]
    unit = str(evidence.run.get("objective_unit", ""))
    values = {t.number: v * factor for t in trials if (v := number(t.objective)) is not None}
    low, high, log = domain(values.values(), zero=True)
    numbers = [t.number for t in trials]
    plot = Plot(
        Axis("trial", min(numbers) - 0.7, max(numbers) + 0.7, ticks=_numbers(numbers)),
        Axis(objective_title(evidence, log=log), low, high, log),
        width=960,
        height=330,
        left=66,
    )
    best = _best_so_far(evidence, values)
    default = next((t for t in trials if t.source == "default" and t.number in values), None)
    if default is not None:
        plot.horizontal(values[default.number], "default", "s-default")
    if best:
        plot.line([*best, (max(numbers) + 0.7, best[-1][1])], "s-best", stepped=True)
    for trial in shown(trials, evidence):
        kind = outcome_of(trial)
        # A trial without a value stands on the axis: it is data, and it has no height.
        y = values.get(trial.number, low)
        tip = f"trial {trial.number} ({trial.source}): {quantity(number(trial.objective), unit)}, "
        plot.mark(trial.number, y, *MARKS[kind], tip + outcome_text(trial))
    present = [kind for kind in MARKS if any(outcome_of(t) == kind for t in trials)]
    legend = [mark_key(*MARKS[kind], KEYS[kind]) for kind in present]
    if best:
        legend.append(line_key("s-best", "best so far that met the SLO"))
    if default is not None:
        legend.append(line_key("s-default", "default"))
    return Figure(
        id="history",
        title="Search history",
        caption=(
            f"Objective of each search trial, {'lower' if evidence.minimize else 'higher'} is "
            "better. Each is one measurement; finalists are measured again in the proof. Failed "
            "trials stand on the axis."
        ),
        drawings=[plot.render()],
        columns=["Trial", "Source", "Objective", "Outcome"],
        rows=[
            [str(t.number), t.source, quantity(number(t.objective), unit), outcome_text(t)]
            for t in shown(trials, evidence)
        ],
        legend=legend,
    )


def _best_so_far(evidence: Evidence, values: dict[int, float]) -> list[tuple[float, float]]:
    best: list[tuple[float, float]] = []
    for trial in evidence.search_trials:
        value = values.get(trial.number)
        if (
            trial.slo_met
            and value is not None
            and (not best or evidence.better(value, best[-1][1]))
        ):
            best.append((float(trial.number), value))
    return best


def _numbers(numbers: Sequence[int]) -> list[tuple[float, str]]:
    """Whole trial numbers, some twelve at most, evenly spread."""
    low, high = min(numbers), max(numbers)
    strides = (m * 10**k for k in range(12) for m in (1, 2, 5))
    stride = next(s for s in strides if (high - low) / s <= 14)
    return [(float(n), str(n)) for n in range(-(-low // stride) * stride, high + 1, stride)]
