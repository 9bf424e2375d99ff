"""The options of a plan as tables: the best of each GPU, and all of them to sort."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reports.charts.memory_bars import read_memory
from reports.estimate import Estimate
from reports.formatting import MISSING, milliseconds, number, significant, size
from reports.plan.evidence import Option, Plan, Standing
from reports.plan.money import chance, dollar_range, dollars
from reports.plan.verdict import binding_text, constraint
from reports.trials import TrialCell

_MOST_SHOWN = 400
_LONGEST_REASON = 240


@dataclass(frozen=True, slots=True)
class RankedRow:
    """One line of the short table: a value and, under it, what qualifies it."""

    rank: int
    chosen: bool
    standing: Standing
    cells: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class OptionRow:
    """One line of the long table."""

    number: int
    outcome: Standing
    cells: Sequence[TrialCell]


@dataclass(frozen=True, slots=True)
class OptionTable:
    """All options; `left_out` counts those that are only in plan.json."""

    columns: Sequence[tuple[str, bool]]
    rows: Sequence[OptionRow]
    left_out: int
    counts: dict[str, int]


def ranked_columns(plan: Plan) -> list[str]:
    """The heads of the short table."""
    latencies = [f"{metric.upper()} {statistic}" for metric, statistic, _ in plan.axes]
    return ["Option", "$ a month", "$ a million tokens", "Chance", *latencies, "Bounded by"]


def ranked_rows(plan: Plan) -> list[RankedRow]:
    """The best option of each GPU, the recommended first, what cannot be run last."""
    return [_ranked(plan, option) for option in plan.best_of_each]


def option_table(plan: Plan) -> OptionTable:
    """Every option of the plan in its order, at most `_MOST_SHOWN`."""
    columns = [
        ("Rank", True),
        ("GPU", False),
        ("Replicas", True),
        ("TP", True),
        ("Weights", False),
        ("max_num_seqs", True),
        ("$ a month", True),
        ("$ a million tokens", True),
        ("Chance", True),
        *((f"{m.upper()} {s} (ms)", True) for m, s, _ in plan.axes),
        ("Output (tokens/s)", True),
        ("Power (kW)", True),
        ("By", False),
        ("Bounded by", False),
        ("Why not", False),
    ]
    counts = {"met": 0, "missed": 0, "failed": 0}
    for option in plan.options:
        counts[option.standing] += 1
    shown = plan.options[:_MOST_SHOWN]
    return OptionTable(
        columns, [_row(plan, o) for o in shown], len(plan.options) - len(shown), counts
    )


def why_not(option: Option) -> str:
    """Why an option is not to be had; empty where nothing speaks against it."""
    reason = str(option.raw.get("reason") or "")
    if not reason and not option.fits:
        short = read_memory(option).shortfall
        reason = f"{size(short)} short on each GPU" if short > 0 else "does not fit"
    if not reason and option.standing == "missed":
        reason = binding_text(option)
    return reason if len(reason) <= _LONGEST_REASON else reason[: _LONGEST_REASON - 1] + "…"


def _ranked(plan: Plan, option: Option) -> RankedRow:
    cost, tokens = option.per_month, option.estimate("usd_per_million_tokens")
    seats = number(option.raw.get("max_num_seqs"))
    told = [option.layout, option.quantization]
    if seats is not None:
        told.append(f"{significant(seats, 6)} sequences")
    named = option.named if option.replicas else option.title
    cells = [
        (named, ", ".join(told)),
        (MISSING if cost is None else dollars(cost.value), dollar_range(cost)),
        (MISSING if tokens is None else dollars(tokens.value), dollar_range(tokens)),
        (chance(option.chance), ""),
    ]
    for metric, statistic, _ in plan.axes:
        latency = option.latency(metric, statistic)
        cells.append(
            (MISSING if latency is None else milliseconds(latency.value), _between(latency))
        )
    reason = why_not(option) if option.standing != "met" else ""
    bound = constraint(option) if option.fits else "does not fit"
    cells.append((bound, reason.removeprefix("does not fit: ")))
    return RankedRow(option.rank, option is plan.recommended, option.standing, cells)


def _between(latency: Estimate | None) -> str:
    if latency is None or not latency.spread:
        return ""
    low, high = milliseconds(latency.low), milliseconds(latency.high)
    return f"{low.removesuffix(' ms')}–{high}"


def _row(plan: Plan, option: Option) -> OptionRow:
    cost, tokens = option.per_month, option.estimate("usd_per_million_tokens")
    watts, output = option.estimate("watts"), option.estimate("output_tokens_per_s")
    seats = number(option.raw.get("max_num_seqs"))
    cells = [
        _amount(float(option.rank), str(option.rank)),
        _words(option.title),
        _amount(float(option.replicas) or None, str(option.replicas or MISSING)),
        _amount(float(option.tensor_parallel_size), str(option.tensor_parallel_size)),
        _words(option.quantization),
        _amount(seats, significant(seats, 6)),
        _amount(*((None, MISSING) if cost is None else (cost.value, dollars(cost.value)))),
        _amount(*((None, MISSING) if tokens is None else (tokens.value, dollars(tokens.value)))),
        _amount(option.chance, chance(option.chance)),
    ]
    for metric, statistic, _ in plan.axes:
        latency = option.latency(metric, statistic)
        text = MISSING if latency is None else milliseconds(latency.value).removesuffix(" ms")
        cells.append(_amount(None if latency is None else latency.value, text))
    cells += [
        _amount(
            *((None, MISSING) if output is None else (output.value, significant(output.value)))
        ),
        _amount(
            None if watts is None else watts.value,
            MISSING if watts is None else significant(watts.value / 1000),
        ),
        _words("simulated" if option.simulated else "arithmetic" if option.fits else ""),
        _words(constraint(option) if option.fits else "does not fit"),
        _words(why_not(option) if option.standing != "met" else ""),
    ]
    return OptionRow(option.rank, option.standing, cells)


def _amount(value: float | None, text: str) -> TrialCell:
    return TrialCell(text, "" if value is None else repr(value))


def _words(text: str) -> TrialCell:
    return TrialCell(text, text.lower(), numeric=False)
