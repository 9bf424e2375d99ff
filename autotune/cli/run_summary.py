"""The result of a run as a person reads it on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from autotune.cli.advice_outcome import print_infeasible_limits, print_scoreboard
from autotune.cli.console import data_console
from autotune.plain_number import plain_number
from autotune.records import RunFolder

_QUALITIES = {
    "perplexity, change": "quality_loss",
    "KL (nats)": "kl",
    "top-1 agreement": "top1_agreement",
}


def print_summary(run: Mapping[str, Any], folder: RunFolder) -> None:
    """Verdict, the changed knobs, default against winner, and where the files are; to stdout."""
    console = data_console()
    result = run["result"]
    console.print()
    console.print(Text(result["verdict"], style="bold"), soft_wrap=True)
    _print_changes(console, result["changes"])
    _print_comparison(console, run)
    _print_infeasible(console, result.get("quality") or {})
    _print_tasks(console, result.get("lm_eval") or {})
    print_scoreboard(console, result.get("scoreboard") or {})
    print_infeasible_limits(console, result.get("infeasible") or ())
    console.print()
    for label, path in (("Report", folder.report_html), *_files(run, folder)):
        console.print(Text(f"{label + ':':15}{path}"), soft_wrap=True)


def _files(run: Mapping[str, Any], folder: RunFolder) -> list[tuple[str, Path]]:
    """What of `deploy/` to name: the bundled engine's and vLLM's, or those of the engine tuned."""
    if "engine" not in run:
        files = {"Engine config": "engine.yaml", "vLLM config": "vllm.yaml"}
    else:
        title, name = run["engine"]["title"], run["engine"]["name"]
        files = {f"{title} config": f"{name}.yaml", "Start with": "serve.sh"}
    paths = ((label, folder.deploy / file) for label, file in files.items())
    return [(label, path) for label, path in paths if "engine" not in run or path.exists()]


def _print_changes(console: Console, changes: Mapping[str, list[Any]]) -> None:
    for name, (old, new) in changes.items():
        console.print(Text(f"  {name}: {_plain(old)} → {_plain(new)}"), soft_wrap=True)


def _print_comparison(console: Console, run: Mapping[str, Any]) -> None:
    result = run["result"]
    table = Table(box=None, pad_edge=False, title=None)
    for heading in ("", "default", "winner"):
        table.add_column(heading, justify="left" if not heading else "right")
    columns = (result["baseline"], result["winner"])
    # A side that could not be measured has no limits.
    sides = [{limit["limit"]: limit for limit in result[key]} for key in ("baseline_slo", "slo")]
    for name in dict.fromkeys(name for side in sides for name in side):
        table.add_row(Text(name), *(_outcome(side.get(name)) for side in sides))
    for name in ("ttft", "tpot", "e2e"):
        for statistic in ("p50", "p95", "p99"):
            table.add_row(f"{name} {statistic}", *(_ms(m, name, statistic) for m in columns))
    for label, key, unit in (
        ("goodput", "goodput_requests_per_s", "requests/s"),
        ("throughput", "output_tokens_per_s", "tokens/s"),
        ("offered", "offered_rate", "requests/s"),
    ):
        values = (None if m is None else m[key] for m in columns)
        table.add_row(
            label, *("-" if v is None else f"{plain_number(v, 4)} {unit}" for v in values)
        )
    shares = (None if m is None else m["slo_attainment"] for m in columns)
    table.add_row("requests within the SLO", *("-" if s is None else f"{s:.1%}" for s in shares))

    for label, key in _QUALITIES.items():
        cells = [_quality(m, key) for m in columns]
        if any(cell != "-" for cell in cells):
            table.add_row(label, *cells)
    console.print(table)


def _quality(metrics: Mapping[str, Any] | None, key: str) -> str:
    """A measured quality with its 95% interval."""
    quality = (metrics or {}).get("quality") or {}
    value, low, high = (quality.get(key + end) for end in ("", "_low", "_high"))
    if value is None:
        return "-"
    scale, unit = (1.0, "") if key == "kl" else (100.0, "%")
    text = f"{scale * value:.3g}{unit}"
    if low is None or high is None or low == high:
        return text
    return f"{text} ({scale * low:.3g} to {scale * high:.3g})"


def _print_infeasible(console: Console, qualities: Mapping[str, Mapping[str, Any]]) -> None:
    """What was left out because its harm breaks the SLO."""
    for name, quality in qualities.items():
        if not quality["feasible"]:
            line = Text(f"  left out: {name}, {quality['reason']}", style="yellow")
            console.print(line, soft_wrap=True)


def _print_tasks(console: Console, scores: Mapping[str, Mapping[str, Any]]) -> None:
    """lm-eval's scores of default and winner."""
    for task, metrics in scores.get("default", {}).items():
        for name, value in metrics.items():
            other = scores["winner"].get(task, {}).get(name)
            after = "-" if other is None else f"{other:.4g}"
            console.print(Text(f"  {task} {name}: {value:.4g} → {after}"), soft_wrap=True)


def _outcome(limit: Mapping[str, Any] | None) -> Text:
    if limit is None:
        return Text("-")
    if limit["met"]:
        return Text("met", style="green")
    missed = "missed" if limit["measured"] is None else f"missed by {limit['violation']:.0%}"
    return Text(missed, style="red")


def _ms(metrics: Mapping[str, Any] | None, name: str, statistic: str) -> str:
    value = None if metrics is None else metrics[name][statistic]
    return "-" if value is None else f"{value * 1e3:.4g} ms"


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
