"""A plan as a person reads it on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from autotune.cli.console import data_console
from autotune.plain_number import plain_number

if TYPE_CHECKING:
    from autotune.planning.plan import Plan

# Rows of the table, if not all are asked for.
_SHOWN = 8
_BINDS = {
    "kv_cache": "KV cache",
    "compute": "compute",
    "bandwidth": "bandwidth",
    "link": "GPU link",
    "latency": "latency",
    "queue": "queue",
    "weights": "weights",
}


def print_plan(plan: Plan, *, show_all: bool) -> None:
    """Verdict, ranked table, and what is to be known of the best option; to stdout."""
    told = plan.to_json()
    console = data_console()
    options: list[dict[str, Any]] = told["options"]
    console.print(Text(_question(told["request"])), soft_wrap=True)
    console.print(Text(_verdict(told), style="bold"), soft_wrap=True)
    shown = options if show_all else _best(options)
    if any(option["replicas"] is not None for option in shown):
        console.print()
        console.print(_table(shown))
    _print_rest(console, options, shown)
    if options and options[0]["feasible"]:
        _print_best(console, told)
        _print_sensitivity(console, told)
        _print_growth(console, told)
    for text in told["would_fit"]:
        console.print(Text(f"  {text}"), soft_wrap=True)


def _question(request: Mapping[str, Any]) -> str:
    model, workload = request["model"], request["workload"]
    size = f"{model['parameters'] / 1e9:.3g}B parameters"
    if model["active_parameters"] < 0.7 * model["parameters"]:
        size += f", {model['active_parameters'] / 1e9:.3g}B active"
    lengths = (
        f"{workload['input_tokens']['mean']:.0f} tokens in, "
        f"{workload['output_tokens']['mean']:.0f} out on the mean"
    )
    spares = request["spares"]
    away = f", {spares} replica{'s' if spares > 1 else ''} away" if spares else ""
    return (
        f"{model['name']} ({size}), {request['rate']:g} requests/s of {workload['source']} "
        f"({lengths}); planned for {request['design_rate']:.4g} requests/s{away}, {request['slo']}"
    )


def _verdict(told: Mapping[str, Any]) -> str:
    options = told["options"]
    if not told["slo_met"]:
        if not any(option["fits"] for option in options):
            return "Nothing of this holds the model."
        return "Nothing of this keeps the SLO."
    best = options[0]
    return (
        f"Best: {best['gpus']} x {best['gpu']}, {_layout(best)}, {_quantization(best)}: "
        f"{_usd(best['usd_per_month'])} a month "
        f"({_span(best['intervals']['usd_per_month'], _usd)}), "
        f"{best['usd_per_million_tokens']:.3g} USD per million output tokens, chance of keeping "
        f"the SLO {_chance(best['p_meets_slo'])}"
    )


def _best(options: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best options, and the best of each GPU beside them."""
    seen: set[str] = set()
    shown = []
    for place, option in enumerate(options):
        if not option["fits"]:
            continue
        if place < _SHOWN - 3 or option["gpu"] not in seen:
            shown.append(option)
        seen.add(option["gpu"])
    return shown


def _table(options: Sequence[Mapping[str, Any]]) -> Table:
    """Two lines an option: what is expected, and below it the bounds that hold 90%."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for heading, left in (
        ("", False),
        ("GPUs\nweights, replicas", True),
        ("USD/month", False),
        ("USD/Mtok", False),
        ("chance\nkW", False),
        ("ttft p95\nms", False),
        ("tpot p95\nms", False),
        ("binds\nfound by", True),
    ):
        table.add_column(heading, justify="left" if left else "right", no_wrap=True)
    for option in options:
        spans = option["intervals"] or {}
        power = "-" if option["watts"] is None else f"{option['watts'] / 1e3:.3g}"
        how = "simulation" if option["method"] == "simulated" else "arithmetic"
        table.add_row(
            "-" if option["rank"] is None else str(option["rank"]),
            f"{option['gpus'] or '-'} x {option['gpu']}\n"
            f"{_quantization(option)}, {_layout(option)}",
            _with_span(option["usd_per_month"], spans.get("usd_per_month"), _usd),
            _with_span(option["usd_per_million_tokens"], spans.get("usd_per_million_tokens"), _two),
            f"{_chance(option['p_meets_slo'])}\n{power}",
            _latency(option["ttft"]),
            _latency(option["tpot"]),
            f"{_BINDS.get(option['binding_constraint'] or '', '-')}\n{how}",
        )
    return table


def _print_rest(
    console: Console, options: Sequence[Mapping[str, Any]], shown: Sequence[Mapping[str, Any]]
) -> None:
    hidden = [option for option in options if option not in shown]
    fitting = sum(option["fits"] for option in hidden)
    if fitting:
        console.print(f"{fitting} more fit: --all, --json or -o show them.", soft_wrap=True)
    missed = [o for o in shown if o["fits"] and not o["feasible"] and o["reason"]]
    for option in missed:
        text = f"  {_name(option)}: {option['reason']}"
        console.print(Text(text, style="yellow"), soft_wrap=True)
    small = [option for option in options if not option["fits"]]
    for option in small[:4]:
        console.print(Text(f"  {_name(option)}: {option['reason']}"), soft_wrap=True)
    if len(small) > 4:
        console.print(f"  {len(small) - 4} more do not fit")


def _print_best(console: Console, told: Mapping[str, Any]) -> None:
    best, request = told["options"][0], told["request"]
    capacity = best["capacity"]["requests_per_s"]
    memory = best["memory"]
    gib = 2**30
    parts = ", ".join(
        f"{name.replace('_', ' ')} {size / gib:.3g}"
        for name, size in memory["parts"].items()
        if size > 0.05 * gib
    )
    console.print()
    console.print(Text(f"The best: {_name(best)}", style="bold"), soft_wrap=True)
    lines = [
        ("what binds", best["binding"]["text"]),
        (
            "carries",
            f"{plain_number(capacity['value'])} requests/s "
            f"({_span(capacity, plain_number)}) within the SLO with "
            f"{best['spare_replicas']} of {best['replicas']} replicas away; in use "
            f"{best['utilization']:.0%} at {request['rate']:g} requests/s",
        ),
        ("memory, GiB", f"{parts}, of {memory['total_bytes'] / gib:.4g} on each GPU"),
        ("KV cache", _kv(memory)),
        ("batch", _batch(best)),
    ]
    normal = best["normal"]
    if normal is not None:
        lines.append(
            (
                "usually",
                f"ttft p50 {normal['ttft']['p50'] * 1e3:.3g} ms, p95 "
                f"{normal['ttft']['p95'] * 1e3:.3g} ms; tpot p50 {normal['tpot']['p50'] * 1e3:.3g} "
                "ms, with all replicas at the mean rate",
            )
        )
    price = best["price"]
    listed = f"{price['where']}, {price['date']}" if price["date"] else price["where"]
    lines.append(
        (
            "price",
            f"{price['usd_per_gpu_hour']:.3g} USD a GPU-hour ({listed}; elsewhere "
            f"{price['low']:.3g} to {price['high']:.3g})",
        )
    )
    if best["break_even_usd_per_gpu_hour"] is not None:
        lines.append(
            (
                "break-even",
                f"the cheapest up to {best['break_even_usd_per_gpu_hour']:.3g} USD a GPU-hour, "
                "against the best on another GPU",
            )
        )
    outgrown = best["outgrown"]
    when = ""
    if request["growth"] is not None:
        months = outgrown["months"]
        when = ", beyond the next 3 years" if months is None else f", in {months:.1f} months"
    lines.append(("outgrown", f"at a mean of {outgrown['rate']:.4g} requests/s{when}"))
    for label, text in lines:
        console.print(Text(f"  {label:12} {text}"), soft_wrap=True)


def _print_sensitivity(console: Console, told: Mapping[str, Any]) -> None:
    options = told["options"]
    rows = told["sensitivity"]
    console.print()
    console.print(Text("If it comes otherwise", style="bold"))
    table = Table(box=None, pad_edge=False)
    for heading in ("", "best then", "GPUs", "USD/month"):
        table.add_column(heading, justify="left" if heading in ("", "best then") else "right")
    for row in rows:
        known = [entry for entry in row["options"] if entry["usd_per_hour"] is not None]
        if not known:
            table.add_row(row["change"], "nothing of what is ranked", "-", "-")
            continue
        cheapest = min(known, key=lambda entry: entry["usd_per_hour"])
        option = options[cheapest["index"]]
        gpus = cheapest["replicas"] * option["tensor_parallel_size"]
        usd = cheapest["usd_per_hour"] * 730
        table.add_row(row["change"], _kind(option), str(gpus), _usd(usd))
    console.print(table)


def _print_growth(console: Console, told: Mapping[str, Any]) -> None:
    rows = told["growth"]
    if not rows:
        return
    options = told["options"]
    console.print()
    console.print(Text("As the rate grows", style="bold"))
    table = Table(box=None, pad_edge=False)
    shown = [entry["index"] for entry in rows[0]["options"]][:3]
    table.add_column("month", justify="right")
    table.add_column("requests/s", justify="right")
    for index in shown:
        table.add_column(f"{_kind(options[index])}\nGPUs, USD/month", justify="right")
    for row in rows:
        cells = []
        for index in shown:
            entry = next(e for e in row["options"] if e["index"] == index)
            if entry["replicas"] is None:
                cells.append("-")
                continue
            gpus = entry["replicas"] * options[index]["tensor_parallel_size"]
            cells.append(f"{gpus}, {_usd(entry['usd_per_month'])}")
        table.add_row(f"{row['month']:g}", f"{row['rate']:.4g}", *cells)
    console.print(table)


def _name(option: Mapping[str, Any]) -> str:
    return f"{_kind(option)}, {_layout(option)}"


def _kind(option: Mapping[str, Any]) -> str:
    ranks = option["tensor_parallel_size"]
    each = f" in {ranks}s" if ranks > 1 else ""
    return f"{option['gpu']}{each}, {_quantization(option)}"


def _layout(option: Mapping[str, Any]) -> str:
    ranks = option["tensor_parallel_size"]
    each = f" of {ranks}" if ranks > 1 else ""
    if option["replicas"] is None:
        return f"replicas{each}" if each else "-"
    spares = f"+{option['spare_replicas']}" if option["spare_replicas"] else ""
    return f"{option['replicas_needed']}{spares}{each}"


def _quantization(option: Mapping[str, Any]) -> str:
    name: str = option["quantization"]
    return "as they are" if name == "none" else name


def _kv(memory: Mapping[str, Any]) -> str:
    text = (
        f"{memory['kv_tokens']:,} tokens a replica, "
        f"{memory['kv_bytes_per_token'] / 1024:.4g} KiB each on a GPU"
    )
    needed = memory["kv_tokens_needed"]
    return text if needed is None else f"{text}; about {needed:,} in use at the burst"


def _batch(option: Mapping[str, Any]) -> str:
    return (
        f"max_num_seqs {option['max_num_seqs']}, max_num_batched_tokens "
        f"{option['max_num_batched_tokens']}, max_model_len {option['max_model_len']}"
    )


def _latency(values: Mapping[str, Any] | None) -> str:
    found = (values or {}).get("p95")
    if not found:
        return "-"
    return f"{_ms(found['value'])}\n{_ms(found['low'])}-{_ms(found['high'])}"


def _ms(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:.0f}" if ms >= 10 else f"{ms:.2g}"


def _two(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _with_span(value: float | None, span: Mapping[str, Any] | None, show: Any) -> str:
    if value is None:
        return "-"
    return f"{show(value)}\n{_span(span, show)}" if span else str(show(value))


def _span(interval: Mapping[str, Any], show: Any) -> str:
    return f"{show(interval['low'])}-{show(interval['high'])}"


def _usd(value: float) -> str:
    if value >= 10_000:
        return f"{value / 1000:,.0f}k"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _chance(value: float | None) -> str:
    if value is None:
        return "-"
    # Nothing predicted is certain.
    return ">99%" if value > 0.99 else f"{value:.0%}"
