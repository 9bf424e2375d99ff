"""How long each choice lasts while the traffic grows, and what keeping up would cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from reports.charts.figure import Figure, line_key, mark_key
from reports.charts.plot import Axis, Plot
from reports.charts.scale import domain
from reports.charts.series import SERIES
from reports.formatting import MISSING, mapping, number, sequence, significant
from reports.plan.evidence import Option, Plan
from reports.plan.money import dollars

_MOST_BARS = 8
_LONGEST = 1200.0  # months; what is said of later is no plan


@dataclass(frozen=True, slots=True)
class Lasting:
    """One option while the traffic grows; `months` None where it lasts the whole time.

    `needs` are (month, rate, replicas, USD a month), each None where it was not told.
    """

    option: Option
    months: float | None
    rate: float | None
    needs: Sequence[tuple[float, float | None, float | None, float | None]]

    @property
    def text(self) -> str:
        """How long it lasts, in words."""
        if self.months is None:
            return "lasts all of it"
        if self.months <= 0:
            return "outgrown from the start"
        rate = f", at {significant(self.rate)} requests/s" if self.rate is not None else ""
        return f"outgrown after {_span(self.months)}{rate}"

    @property
    def costs(self) -> list[tuple[float, float]]:
        """(month, USD a month) wherever the cost is known, by rising month."""
        return sorted((month, cost) for month, _, _, cost in self.needs if cost is not None)


def read_growth(plan: Plan) -> list[Lasting]:
    """The best option of each GPU that can be bought, the recommended first; none without growth.

    The plan tells of each month which option would need what, and of each option when the replicas
    bought for it cease to suffice.
    """
    rows = [mapping(row) for row in sequence(plan.raw.get("growth"))]
    if not rows:
        return []
    found = []
    for option in plan.best_of_each:
        outgrown = mapping(option.raw.get("outgrown"))
        needs = _needs(plan, option, rows)
        if option.standing == "met" and (outgrown or needs):
            lasting = Lasting(
                option, number(outgrown.get("months")), number(outgrown.get("rate")), needs
            )
            found.append(lasting)
    return found[:_MOST_BARS]


def growth_figure(plan: Plan) -> Figure | None:
    """A bar an option up to the month in which it is outgrown, and lines of the cost to keep up.

    None where no growth was asked for.
    """
    entries = read_growth(plan)
    months = [number(mapping(row).get("month")) or 0.0 for row in sequence(plan.raw.get("growth"))]
    horizon = max([*months, *(e.months or 0.0 for e in entries)], default=0.0)
    if not entries or not 0 < horizon <= _LONGEST:
        return None
    # The bars need no more room than the longest of them.
    longest = max(horizon if e.months is None else e.months for e in entries)
    room = next((m for m in sorted(months) if m > 1.3 * longest), horizon)
    drawings = [_bars(plan, entries, room)]
    lines = [e for e in entries if len(e.costs) > 1][: len(SERIES)]
    legend = [mark_key("square", "bar s-winner", "what is bought now suffices")]
    if lines:
        drawings.append(_costs(lines, horizon))
        legend += [
            line_key(f"{SERIES[i][1]} thin", f"cost with {e.option.title}")
            for i, e in enumerate(lines)
        ]
    return Figure(
        id="growth",
        title="While the traffic grows",
        caption=(
            f"Traffic grows {growth_asked(plan)} from the rate that was planned for. Above, until "
            "when what is bought now keeps the promise; below, what each choice costs if replicas "
            "are added in time."
        ),
        drawings=drawings,
        columns=["Option", "Month", "Requests/s", "Replicas", "$ a month"],
        rows=[row for entry in entries for row in _rows(entry)],
        legend=legend,
    )


def growth_sentence(plan: Plan) -> str:
    """When the recommended option is outgrown; empty without growth or recommendation."""
    entry = next((e for e in read_growth(plan) if e.option is plan.recommended), None)
    if entry is None:
        return ""
    if entry.months is None:
        return f"Growing {growth_asked(plan)}, it lasts beyond what was looked at."
    return f"Growing {growth_asked(plan)}, it is {entry.text}."


def growth_asked(plan: Plan) -> str:
    """The growth that was asked for, in words; empty where none was."""
    asked = plan.request.get("growth")
    factor, months = (number(mapping(asked).get(key)) for key in ("factor", "months"))
    if factor is not None and months is not None:
        return f"{significant(factor)}× every {significant(months)} months"
    return str(asked) if isinstance(asked, str) else ""


def _span(months: float) -> str:
    if months < 2:
        weeks = round(months * 52 / 12)
        return "less than a week" if weeks < 1 else "a week" if weeks == 1 else f"{weeks} weeks"
    return f"{significant(months, 2)} months"


def _needs(
    plan: Plan, option: Option, rows: Sequence[Mapping[str, object]]
) -> list[tuple[float, float | None, float | None, float | None]]:
    found = []
    for row in rows:
        month = number(row.get("month"))
        for item in map(mapping, sequence(row.get("options"))):
            if month is not None and plan.option_at(item.get("index")) is option:
                replicas, cost = (number(item.get(k)) for k in ("replicas", "usd_per_month"))
                found.append((month, number(row.get("rate")), replicas, cost))
    return found


def _bars(plan: Plan, entries: Sequence[Lasting], horizon: float) -> Markup:
    count = len(entries)
    labels = [(count - 1 - i, e.option.short) for i, e in enumerate(entries)]
    plot = Plot(
        Axis("months from now", 0.0, horizon * 1.02, ticks=_ticks(horizon)),
        Axis("", -0.6, count - 0.4, ticks=labels, grid=False),
        width=960,
        height=64 + 32 * count,
        left=190,
        top=10,
        right=20,
    )
    for index, entry in enumerate(entries):
        row = count - 1 - index
        end = horizon if entry.months is None else min(max(entry.months, 0.0), horizon)
        series = "s-winner" if entry.option is plan.recommended else "s-other"
        plot.bar((0.0, row - 0.3), (end, row + 0.3), series, f"{entry.option.short}: {entry.text}")
        inside = plot.x(end) > plot.left + 0.6 * (plot.right - plot.left)
        x = plot.x(end) + (-7 if inside else 7)
        plot.text(x, plot.y(row) + 4, entry.text, "label", anchor="end" if inside else "start")
    return plot.render()


def _costs(lines: Sequence[Lasting], horizon: float) -> Markup:
    values = [cost for entry in lines for _, cost in entry.costs if cost > 0]
    low, high, log = domain(values, zero=True)
    plot = Plot(
        Axis("months from now", 0.0, horizon * 1.02, ticks=_ticks(horizon)),
        Axis(
            "$ a month, log scale" if log else "$ a month",
            low,
            high,
            log,
            text=lambda v: f"${significant(v / 1000)}k" if v >= 1000 else f"${significant(v)}",
        ),
        width=960,
        height=270,
        left=190,
        top=24,
        right=20,
        title="Cost of keeping up",
    )
    for index, entry in enumerate(lines):
        shape, series = SERIES[index]
        # What is needed at a mark is bought before it: between marks the cost is on its way up.
        plot.line(entry.costs, f"{series} thin")
        for month, cost in entry.costs:
            tip = f"{entry.option.title}, month {significant(month)}: {dollars(cost)} a month"
            plot.mark(month, cost, shape, series, tip, size=3.5)
    return plot.render()


def _ticks(horizon: float) -> list[tuple[float, str]]:
    """Whole quarters, half-years or years, as many as are easily read."""
    step = next((s for s in (1, 3, 6, 12, 24) if horizon / s <= 12), 48)
    return [(float(month), str(month)) for month in range(0, int(horizon) + 1, step)]


def _rows(entry: Lasting) -> list[list[str]]:
    rows = [
        [
            entry.option.short,
            significant(month),
            significant(rate),
            significant(replicas, 6),
            dollars(cost),
        ]
        for month, rate, replicas, cost in entry.needs
    ]
    return [*rows, [entry.option.short, entry.text, MISSING, MISSING, MISSING]]
