"""Advice on the terminal: the binding limit, what to do first, the ranked list, what cannot be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from autotune.cli.advice_outcome import print_infeasible_limits
from autotune.cli.console import data_console

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
        _print_table(advice, console)
        explained = advice.advice if show_all else _first_ones(advice)
        for item in explained:
            _print_item(item, _own_why(item, diagnosis), console, item.technique == advice.first)
        left = len(advice.advice) - len(explained)
        if left > 0:
            console.print()
            console.print(f"--all explains the other {left}.")
    print_infeasible_limits(console, [asdict(limit) for limit in advice.infeasible])
    notes = [*profile.partial, *diagnosis.unjudged, *advice.notes]
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
    if diagnosis.binding_limit is None or diagnosis.binding_ratio is None:
        return
    ratio = diagnosis.binding_ratio
    state = "missed" if ratio > 1 else "met"
    line = f"{diagnosis.binding_limit} binds: {state}, at {ratio:.3g} of it"
    console.print(Text(line, style="bold"), soft_wrap=True)


def _print_findings(diagnosis: Diagnosis, console: Console) -> None:
    """The worst finding of each metric."""
    worst = {finding.metric: finding for finding in reversed(diagnosis.findings)}
    for metric, finding in reversed(worst.items()):
        head = Text(f"{_METRICS.get(metric, metric)}: ", style="bold")
        _indented(head.append(finding.sentence, style="not bold"), console)


def _print_table(advice: AdviceList, console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    gains = [item.gain for item in advice.advice if item.gain is not None]
    predicted = _metric(gains[0]) if gains else "predicted"
    for heading in ("", predicted, "confidence", "takes", "testable", "advice"):
        right = heading in ("", predicted)
        wraps = heading == "advice"
        justify: Literal["left", "right"] = "right" if right else "left"
        table.add_column(heading, justify=justify, no_wrap=not wraps, overflow="fold")
    for position, item in enumerate(advice.advice, 1):
        table.add_row(
            str(position),
            "-" if item.gain is None else _ratio(item.gain),
            item.confidence,
            _EFFORTS[item.effort],
            "yes" if item.testable else "no",
            Text(item.title + _knobs(item)),
        )
    console.print()
    console.print(table)


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
