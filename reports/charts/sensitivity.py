"""What the best options would cost, were the rate, the lengths or the prices different."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reports.charts.figure import Figure, mark_key
from reports.charts.plot import Axis, Plot
from reports.charts.scale import domain
from reports.charts.series import SERIES
from reports.formatting import MISSING, mapping, number, sequence, significant
from reports.plan.evidence import Option, Plan
from reports.plan.money import HOURS_PER_MONTH, dollars

_AS_PLANNED = "as planned"
_MOST_ROWS = 16


@dataclass(frozen=True, slots=True)
class Case:
    """Things as they may be: what each option would take, by its rank in the plan."""

    name: str
    replicas: dict[int, float]
    monthly: dict[int, float]

    def cheapest(self, options: Sequence[Option]) -> Option | None:
        """The cheapest of the options in this case; the first of equals."""
        known = [o for o in options if o.rank in self.monthly]
        return min(known, key=lambda o: self.monthly[o.rank]) if known else None


def read_cases(plan: Plan) -> list[Case]:
    """The cases of the plan after things as planned; none where it looked at none."""
    cases = []
    for row in map(mapping, sequence(plan.raw.get("sensitivity"))):
        replicas, monthly = {}, {}
        for item in map(mapping, sequence(row.get("options"))):
            option = plan.option_at(item.get("index"))
            if option is None:
                continue
            count, hourly = number(item.get("replicas")), number(item.get("usd_per_hour"))
            if count is not None:
                replicas[option.rank] = count
            if hourly is not None:
                monthly[option.rank] = hourly * HOURS_PER_MONTH
        name = str(row.get("change") or row.get("kind") or "?").replace(" x ", " × ")
        cases.append(Case(name, replicas, monthly))
    if not cases:
        return []
    told = {rank for case in cases for rank in case.monthly}
    planned = Case(
        _AS_PLANNED,
        {o.rank: float(o.replicas) for o in plan.options if o.rank in told},
        {o.rank: o.per_month.value for o in plan.options if o.rank in told and o.per_month},
    )
    return [planned, *cases[:_MOST_ROWS]]


def compared(plan: Plan, cases: Sequence[Case]) -> list[Option]:
    """The options that are drawn: the best of each GPU that any case tells of."""
    told = {rank for case in cases for rank in case.monthly}
    best = [o for o in plan.best_of_each if o.rank in told]
    return best[: len(SERIES)]


def flips(plan: Plan) -> list[str]:
    """In which cases another option would be the cheapest, as sentences."""
    cases = read_cases(plan)
    options = compared(plan, cases)
    if plan.recommended is None or plan.recommended not in options:
        return []
    usual = cases[0].cheapest(options)
    by_option: dict[str, list[str]] = {}
    for case in cases[1:]:
        cheapest = case.cheapest(options)
        if cheapest is not None and cheapest is not usual:
            by_option.setdefault(cheapest.title, []).append(case.name)
    return [
        f"{title} would be the cheapest with {'; with '.join(names)}."
        for title, names in by_option.items()
    ]


def sensitivity_figure(plan: Plan) -> Figure | None:
    """A row a case, a mark an option; None where nothing else was looked at."""
    cases = read_cases(plan)
    options = compared(plan, cases)
    values = [c.monthly[o.rank] for c in cases for o in options if o.rank in c.monthly]
    if not values:
        return None
    count = len(cases)
    low, high, log = domain(values, log=None if min(values) > 0 else False)
    if not log:
        low = 0.0
    labels = [(count - 1 - i, _short(case.name)) for i, case in enumerate(cases)]
    plot = Plot(
        Axis(
            "$ a month to keep the promise" + (", log scale" if log else ""),
            low,
            high,
            log,
            count=6,
            text=lambda v: f"${significant(v / 1000)}k" if v >= 1000 else f"${significant(v)}",
        ),
        Axis("", -0.7, count - 0.3, ticks=labels),
        width=960,
        height=72 + 32 * count,
        left=210,
        top=22,
        right=24,
    )
    first = plan.recommended if plan.recommended in options else options[0]
    base = cases[0].monthly.get(first.rank)
    if base is not None:
        plot.vertical(base, f"{first.gpu} as planned, {dollars(base)}", "s-limit", above=True)
    for index, case in enumerate(cases):
        row = count - 1 - index
        placed = [case.monthly[o.rank] for o in options if o.rank in case.monthly]
        if len(placed) > 1:
            plot.line([(min(placed), row), (max(placed), row)], "s-default whisker faint")
        for place, option in reversed(list(enumerate(options))):
            cost = case.monthly.get(option.rank)
            if cost is None:
                continue
            shape, series = SERIES[place]
            count_ = case.replicas.get(option.rank)
            replicas = "" if count_ is None else f", {significant(count_)} replicas"
            tip = f"{case.name}: {option.title}, {dollars(cost)} a month{replicas}"
            plot.mark(cost, row, shape, series, tip, size=6.0 if option is first else 5.0)
    return Figure(
        id="sensitivity",
        title="If it turns out otherwise",
        caption=(
            "One thing changed at a time; each mark is what keeping the promise would then cost "
            "with that GPU. Where another mark is the leftmost, another choice would be cheaper."
        ),
        drawings=[plot.render()],
        columns=["Case", *(o.short for o in options), "Cheapest"],
        rows=[_row(case, options) for case in cases],
        legend=[mark_key(*SERIES[place], o.title) for place, o in enumerate(options)],
    )


def _row(case: Case, options: Sequence[Option]) -> list[str]:
    texts = []
    for option in options:
        cost, count = case.monthly.get(option.rank), case.replicas.get(option.rank)
        replicas = "" if count is None else f" ({significant(count)} replicas)"
        texts.append(MISSING if cost is None else dollars(cost) + replicas)
    cheapest = case.cheapest(options)
    return [case.name, *texts, MISSING if cheapest is None else cheapest.short]


def _short(text: str) -> str:
    return text if len(text) <= 32 else text[:31] + "…"
