"""Advice on the terminal: the binding limit, what to do first, the ranked list, what cannot be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from autotune.advise.rank import helps
from autotune.cli.advice_outcome import print_infeasible_limits
from autotune.cli.binding_limit import binding_limit
from autotune.cli.console import data_console
from autotune.diagnose.not_known import not_known

if TYPE_CHECKING:
    from autotune.advise.advice import Advice, AdviceList
    from autotune.diagnose.finding import Diagnosis
    from autotune.predict.gain import PredictedGain
    from autotune.profiling.schema import Profile

_EFFORTS: Mapping[str, str] = {
    "knob": "a flag",
    "reload": "a reload",
    "prepare": "preparation",
    "deploy": "deployment",
    "train": "training",
    "buy": "hardware",
}
_METRICS: Mapping[str, str] = {
    "ttft": "TTFT",
    "tpot": "TPOT",
    "e2e": "E2E",
    "itl": "ITL",
    "throughput": "throughput",
    "cost": "cost",
    "memory": "memory",
    "goodput": "goodput",
}
# Pieces of advice that are explained unless all are asked for.
_EXPLAINED = 3


def print_advice(
    profile: Profile,
    diagnosis: Diagnosis,
    advice: AdviceList,
    *,
    show_all: bool = False,
    console: Console | None = None,
) -> None:
    """Print diagnosis and advice; to stdout."""
    console = console or data_console()
    _print_binding(diagnosis, console)
    _print_findings(diagnosis, console)
    if not advice.advice:
        console.print()
        console.print("Nothing in the table of techniques is called for by this profile.")
    else:
        _print_groups(profile, advice, console)
        explained = advice.advice if show_all else _first_ones(advice)
        for item in explained:
            _print_item(item, _own_why(item, diagnosis), console, item.technique == advice.first)
        left = len(advice.advice) - len(explained)
        if left > 0:
            console.print()
            console.print(f"--all explains the other {left}.")
    print_infeasible_limits(console, [asdict(limit) for limit in advice.infeasible])
    notes = [*not_known(profile, diagnosis), *advice.notes]
    if notes:
        console.print()
        console.print("[bold]Not known, or left out[/]")
        for text in dict.fromkeys(notes):
            _indented(Text(text), console)


def _first_ones(advice: AdviceList) -> list[Advice]:
    """What to do first, and the best of the others."""
    items = sorted(advice.advice, key=lambda item: item.technique != advice.first)
    return items[:_EXPLAINED]


def _print_binding(diagnosis: Diagnosis, console: Console) -> None:
    if diagnosis.binding_limit is not None:
        line = binding_limit(diagnosis.binding_limit, diagnosis.binding_ratio)
        console.print(Text(line, style="bold"), soft_wrap=True)


def _print_findings(diagnosis: Diagnosis, console: Console) -> None:
    """The worst finding of each metric."""
    worst = {finding.metric: finding for finding in reversed(diagnosis.findings)}
    for metric, finding in reversed(worst.items()):
        head = Text(f"{_METRICS.get(metric, metric)}: ", style="bold")
        _indented(head.append(finding.sentence, style="not bold"), console)


def _print_groups(profile: Profile, advice: AdviceList, console: Console) -> None:
    """The ranked list: what the bundled engine can try here, and the rest."""
    here = [item for item in advice.advice if item.testable]
    beyond = [item for item in advice.advice if not item.testable]
    of_server = profile.source.kind == "metrics"
    other = "For that server" if of_server else "Beyond the bundled engine, by estimates"
    gains = [item.gain for item in advice.advice if item.gain is not None]
    metric = f", by {_metric(gains[0])}" if gains else ""
    for title, items in (("To try here", here), (other, beyond)):
        if items:
            console.print()
            console.print(Text(title + metric, style="bold"))
            console.print(_ranked_table(items))


def _ranked_table(items: Sequence[Advice]) -> Table:
    """One row a piece of advice: its rank, its gain, and in words that wrap all else."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for position, item in enumerate(items, 1):
        told = Text(item.title + _knobs(item))
        terms = f"{_EFFORTS[item.effort]}, {item.confidence} confidence"
        told.append(f"; {terms}", style="dim")
        elsewhere = _best_elsewhere(item)
        if elsewhere is not None:
            told.append(f"; {_metric(elsewhere)} {elsewhere.value:.2f}x")
        if item.breaks is not None:
            told.append(f"; breaks {item.breaks}", style="yellow")
        table.add_row(str(position), "-" if item.gain is None else _ratio(item.gain), told)
    return table


def _best_elsewhere(item: Advice) -> PredictedGain | None:
    """What makes advice worth a place that is not predicted to help the metric it is ranked by."""
    if helps(item.gain):
        return None
    best = max(item.gains, key=lambda gain: gain.value, default=None)
    return best if helps(best) else None


def _own_why(item: Advice, diagnosis: Diagnosis) -> str:
    """Why the technique helps, without the finding's sentence, which was told already."""
    worst = {finding.metric: finding.sentence for finding in reversed(diagnosis.findings)}
    told = (sentence for sentence in worst.values() if item.why.startswith(sentence))
    return item.why.removeprefix(next(told, "")).strip()


def _print_item(item: Advice, why: str, console: Console, first: bool) -> None:
    console.print()
    head = Text("Do first: " if first else "", style="bold green")
    console.print(head.append(item.title, style="bold"), soft_wrap=True)
    if why:
        _indented(Text(why), console)
    others = [gain for gain in item.gains if gain is not item.gain]
    if others:
        _labelled("also", "; ".join(_gain(gain) for gain in others), console)
    _labelled("costs", item.trade_off, console)
    _labelled("check", item.check, console)
    if item.why_not is not None:
        _labelled("not testable here", item.why_not, console)
    for command in item.commands:
        _labelled("try", command, console)
    _labelled("source", item.source, console)


def _labelled(label: str, text: str, console: Console) -> None:
    _indented(Text.assemble((f"{label}: ", "dim"), text), console)


def _indented(text: Text, console: Console) -> None:
    if console.is_terminal:
        console.print(Padding(text, (0, 0, 0, 2), expand=False))
    else:  # a line each, for programs that read lines
        console.print(Text("  ").append_text(text), soft_wrap=True)


def _knobs(item: Advice) -> str:
    settings = ", ".join(f"{name}={_plain(value)}" for name, value in item.knobs.items())
    return f" ({settings})" if settings else ""


def _gain(gain: PredictedGain) -> str:
    return f"{_metric(gain)} {_ratio(gain)}"


def _metric(gain: PredictedGain) -> str:
    name = _METRICS.get(gain.metric, gain.metric)
    return f"{name} {gain.statistic}" if gain.statistic else name


def _ratio(gain: PredictedGain) -> str:
    return f"{gain.value:.2f}x ({gain.low:.2f} to {gain.high:.2f})"


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
