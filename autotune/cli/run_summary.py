"""The result of a run as a person reads it on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from autotune.cli.console import data_console
from autotune.records import RunFolder


def print_summary(run: Mapping[str, Any], folder: RunFolder) -> None:
    """Verdict, the changed knobs, default against winner, and where the files are; to stdout."""
    console = data_console()
    result = run["result"]
    console.print()
    console.print(Text(result["verdict"], style="bold"), soft_wrap=True)
    _print_changes(console, result["changes"])
    _print_comparison(console, run)
    console.print()
    for label, path in (
        ("Report", folder.report_html),
        ("Engine config", folder.deploy / "engine.yaml"),
        ("vLLM config", folder.deploy / "vllm.yaml"),
    ):
        console.print(Text(f"{label + ':':15}{path}"), soft_wrap=True)


def _print_changes(console: Console, changes: Mapping[str, list[Any]]) -> None:
    for name, (old, new) in changes.items():
        console.print(Text(f"  {name}: {_plain(old)} → {_plain(new)}"), soft_wrap=True)


def _print_comparison(console: Console, run: Mapping[str, Any]) -> None:
    result = run["result"]
    table = Table(box=None, pad_edge=False, title=None)
    for heading in ("", "default", "winner"):
        table.add_column(heading, justify="left" if not heading else "right")
    columns = (result["baseline"], result["winner"])
    for limits in zip(result["baseline_slo"], result["slo"], strict=False):
        table.add_row(
            Text(limits[0]["limit"]),
            *map(_outcome, limits),
        )
    for name in ("ttft", "tpot", "e2e"):
        for statistic in ("p50", "p95", "p99"):
            table.add_row(f"{name} {statistic}", *(_ms(m, name, statistic) for m in columns))
    for label, key, unit in (
        ("goodput", "goodput_requests_per_s", "requests/s"),
        ("throughput", "output_tokens_per_s", "tokens/s"),
        ("offered", "offered_rate", "requests/s"),
    ):
        table.add_row(label, *("-" if m is None else f"{m[key]:.4g} {unit}" for m in columns))
    attained = ("-" if m is None else f"{m['slo_attainment']:.1%}" for m in columns)
    table.add_row("requests within the SLO", *attained)
    console.print(table)


def _outcome(limit: Mapping[str, Any]) -> Text:
    if limit["met"]:
        return Text("met", style="green")
    missed = "missed" if limit["measured"] is None else f"missed by {limit['violation']:.0%}"
    return Text(missed, style="red")


def _ms(metrics: Mapping[str, Any] | None, name: str, statistic: str) -> str:
    value = None if metrics is None else metrics[name][statistic]
    return "-" if value is None else f"{value * 1e3:.4g} ms"


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
