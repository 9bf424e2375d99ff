"""What became of advice, on the terminal: its scoreboard, and the limits that cannot be met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_scoreboard(console: Console, scoreboard: Mapping[str, Any]) -> None:
    """Each piece of advice that was tried: what it promised, and what it brought."""
    entries = scoreboard.get("entries") or ()
    scored = [entry for entry in entries if entry["measured"] is not None]
    if not scored:
        return
    console.print()
    table = Table(box=None, pad_edge=False)
    for heading in ("advice", "metric", "predicted", "measured", ""):
        table.add_column(heading, justify="right" if heading.endswith("ed") else "left")
    for entry in scored:
        metric = " ".join(filter(None, (entry["metric"], entry["statistic"])))
        held = Text("hit", style="green") if entry["held"] else Text("miss", style="red")
        table.add_row(
            Text(entry["title"]),
            metric,
            _ratio(entry["predicted"]),
            _ratio(entry["measured"]),
            held,
        )
    console.print(table)
    console.print(
        Text(
            f"Of {scoreboard['scored']} predictions {scoreboard['held']} held, "
            f"{scoreboard['direction_right']} had the direction right; "
            f"median error {scoreboard['median_error']:.0%}."
        ),
        soft_wrap=True,
    )


def print_infeasible_limits(console: Console, limits: Sequence[Mapping[str, Any]]) -> None:
    """Limits that cannot be met, why, and what would be enough, the cheapest first."""
    for limit in limits:
        console.print()
        console.print(Text(limit["proof"], style="bold"), soft_wrap=True)
        for relaxation in limit["relaxations"]:
            console.print(Text(f"  {relaxation['sentence']}"), soft_wrap=True)


def _ratio(gain: Mapping[str, Any]) -> str:
    text = f"{gain['value']:.3g}x"
    if gain["low"] is None or gain["high"] is None:
        return text
    return f"{text} ({gain['low']:.3g} to {gain['high']:.3g})"
