"""`autotune doctor`: what is here, how fast it is, what is missing and how to get it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from autotune.cli.console import data_console, print_json, progress_steps
from autotune.cli.doctor_tuning import DEFAULT_BUDGET, tune
from autotune.cli.durations import parse_duration
from autotune.cli.exits import ExitCode
from autotune.errors import BadInput

if TYPE_CHECKING:
    from autotune.hardware.ceilings import Ceilings
    from autotune.hardware.checkup import Check
    from autotune.hardware.examination import Findings


_SHORT = {"float8_e4m3fn": "fp8"}


def doctor(
    tune_kernels: Annotated[
        bool,
        typer.Option(
            "--tune-kernels",
            help="Instead of the examination: measure which tiles the engine's GPU kernels run "
            "fastest with for a model, and keep it for all runs on such a GPU.",
        ),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Folder or GGUF file of the model whose kernels are tuned. Default: the embedded "
            "model.",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            help=f"Time for the tuning, for instance 20m; it goes on when repeated. Default: "
            f"{DEFAULT_BUDGET}.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything found as one JSON object.")
    ] = False,
) -> None:
    """Show hardware, libraries and measured limits.

    What is missing is shown with how to get it. Takes about 10 seconds. Exits with 0 if the
    bundled engine can run here, with 3 otherwise. With --tune-kernels the engine's GPU kernels are
    measured instead; 130: interrupted, and the same command goes on.
    """
    if tune_kernels:
        seconds = parse_duration(DEFAULT_BUDGET if budget is None else budget, "--budget")
        tune("" if model is None else model, seconds, as_json=as_json)
        return
    for flag, value in (("--model", model), ("--budget", budget)):
        if value is not None:
            raise BadInput(f"{flag} says how kernels are tuned: give --tune-kernels with it")
    from autotune.hardware.examination import examine

    with progress_steps() as step:
        findings = examine(step)
    if as_json:
        print_json(findings.to_json())
    else:
        _show(findings, data_console())
    if not findings.engine_can_run:
        raise typer.Exit(ExitCode.ENVIRONMENT)


def _show(findings: Findings, console: Console) -> None:
    from autotune.search.methods_offered import methods_by_speed

    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", ratio=1)
    in_order = [c for c in findings.checks if c.library and c.status == "ok"]
    for check in findings.checks:
        if check not in in_order:
            _add(table, check)
        elif check is in_order[0]:
            names = ", ".join(f"{c.name} {c.found}" for c in in_order)
            table.add_row("libraries", "[green]ok[/]", escape(names))
    _add_methods(table, methods_by_speed(findings.hardware))
    console.print(table)
    if findings.ceilings is not None:
        _show_ceilings(findings.ceilings, console)
    if findings.engine_can_run:
        console.print("\nThe bundled engine can run here.")
    else:
        fatal = ", ".join(check.name for check in findings.checks if check.fatal)
        console.print(f"\nThe bundled engine cannot run here for want of {fatal}.", markup=False)


def _add_methods(table: Table, fast: dict[str, bool]) -> None:
    """Quantizations that a search offers here, and those that only run."""
    offered = ", ".join(name for name, is_fast in fast.items() if is_fast)
    others = ", ".join(name for name, is_fast in fast.items() if not is_fast)
    text = f"searched here: {offered}"
    if others:
        text += f"\nno faster than floats here: {others}"
    table.add_row("quantization", "", text)


def _show_ceilings(ceilings: Ceilings, console: Console) -> None:
    console.print(f"\n[bold]Measured on the {ceilings.device.upper()}[/]: the best round")
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    rows = [("memory bandwidth", ceilings.bandwidth, 1e9, "GB/s")]
    rows += [
        (
            f"{_SHORT.get(dtype, dtype)} matmul",
            rate,
            1e12,
            "TOP/s" if dtype == "int8" else "TFLOP/s",
        )
        for dtype, rate in ceilings.matmul.items()
    ]
    for name, rate, scale, unit in rows:
        table.add_row(
            name,
            f"{_number(rate.high / scale)} {unit}",
            f"median {_number(rate.median / scale)}, lowest {_number(rate.low / scale)}"
            if rate.low < rate.high
            else "one round",
        )
    if ceilings.launch_cost is not None and ceilings.graph_launch_cost is not None:
        table.add_row(
            "kernel launch",
            f"{_number(ceilings.launch_cost * 1e6)} µs",
            f"{_number(ceilings.graph_launch_cost * 1e6)} µs from a CUDA graph",
        )
    console.print(table)


def _number(value: float) -> str:
    """Three significant digits, none lost to rounding a small rate to zero."""
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{digits}f}"


def _add(table: Table, check: Check) -> None:
    text = escape(check.found)
    if check.remedy:
        text += f"\n[bold]to mend it:[/] {escape(check.remedy)}"
    style = "green" if check.status == "ok" else "red" if check.fatal else "yellow"
    table.add_row(escape(check.name), f"[{style}]{check.status}[/]", text)
