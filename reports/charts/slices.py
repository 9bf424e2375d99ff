"""Objective against each knob in turn: where in the search space the good trials lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from autotune.records import TrialRecord
from reports.charts.figure import Figure, mark_key
from reports.charts.history import KEYS, MARKS, objective_scale, objective_title
from reports.charts.plot import Axis, Plot
from reports.charts.scale import domain
from reports.evidence import Evidence
from reports.formatting import knob_value, mapping, number, quantity, sequence, significant
from reports.trials import outcome_of, outcome_text, shown

_MOST_KNOBS = 12
_MOST_CATEGORIES = 8


def knob_slices(evidence: Evidence) -> Figure | None:
    """A small drawing a knob; None where no knob varied or no trial was measured."""
    trials = shown(evidence.search_trials, evidence)
    factor = objective_scale(evidence)[1]
    values = {t.number: v * factor for t in trials if (v := number(t.objective)) is not None}
    knobs = evidence.varied_knobs[:_MOST_KNOBS]
    if not knobs or not values:
        return None
    present = [k for k in ("met", "missed") if any(outcome_of(t) == k for t in trials)]
    return Figure(
        id="slices",
        title="Objective by knob",
        caption=(
            "Each search trial once in every drawing, at the value it gave the knob. The other "
            "knobs vary too, so that a column shows a tendency, not the effect of one knob alone."
        ),
        drawings=[_drawing(evidence, knob, trials, values) for knob in knobs],
        columns=["Trial", *knobs, objective_title(evidence)],
        rows=[
            [
                str(t.number),
                *(knob_value(k, t.config.get(k)) for k in knobs),
                significant(values.get(t.number)),
            ]
            for t in trials[:100]
        ],
        layout="small",
        legend=[mark_key(*MARKS[kind], KEYS[kind]) for kind in present],
    )


def _drawing(
    evidence: Evidence, knob: str, trials: Sequence[TrialRecord], values: dict[int, float]
) -> Markup:
    unit = str(evidence.run.get("objective_unit", ""))
    low, high, log = domain(values.values())
    taken = [t.config.get(knob) for t in trials]
    categories = _categories(taken, sequence(mapping(evidence.run.get("search_space")).get(knob)))
    if categories is None:
        numbers = [v for v in map(number, taken) if v is not None]
        x_low, x_high, x_log = domain(numbers)
        x = Axis(knob, x_low, x_high, x_log, count=4, text=lambda v: knob_value(knob, v))
    else:
        ticks = [(float(i), _short(knob_value(knob, c))) for i, c in enumerate(categories)]
        x = Axis(knob, -0.5, len(categories) - 0.5, ticks=ticks)
    plot = Plot(
        x,
        Axis(objective_title(evidence, log=log), low, high, log, count=4),
        width=330,
        height=210,
        left=56,
        top=10,
    )
    for trial in trials:
        value = trial.config.get(knob)
        if trial.number not in values:
            continue
        if categories is None:
            at = number(value)
        else:
            # Spread marks of one category a little, by trial number, so that they do not hide
            # each other; the same folder always gives the same drawing.
            jitter = ((trial.number * 0.618034) % 1.0 - 0.5) * 0.4
            at = next(i for i, c in enumerate(categories) if _same(c, value)) + jitter
        if at is not None:
            tip = (
                f"trial {trial.number}: {knob} {knob_value(knob, value)}, "
                f"{quantity(number(trial.objective), unit)}, {outcome_text(trial)}"
            )
            plot.mark(at, values[trial.number], *MARKS[outcome_of(trial)], tip, size=3.6)
    return plot.render()


def _categories(values: Sequence[Any], declared: Sequence[Any]) -> list[Any] | None:
    """The distinct values in order if they are few or no numbers; None for a numeric axis.

    Numbers come by size, others as the search space declares them.
    """
    distinct: list[Any] = []
    for value in values:
        if not any(_same(value, other) for other in distinct):
            distinct.append(value)
    if len(distinct) > _MOST_CATEGORIES and all(number(v) is not None for v in distinct):
        return None

    def order(value: Any) -> tuple[bool, float, int, str]:
        places = [i for i, other in enumerate(declared) if _same(value, other)]
        amount = number(value)
        place = places[0] if places and amount is None else len(declared)
        return amount is not None, amount or 0.0, place, str(value)

    return sorted(distinct, key=order)


def _same(one: Any, other: Any) -> bool:
    """Equal and of one type: True is not 1 here."""
    return type(one) is type(other) and one == other


def _short(text: str) -> str:
    return text if len(text) <= 10 else text[:9] + "…"
