"""A profile on the terminal: phases, where the time goes, cache, queue, host, and the findings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from autotune.cli.binding_limit import binding_limit
from autotune.cli.console import data_console
from autotune.cli.speculation_summary import speculation_lines
from autotune.diagnose.not_known import not_known

if TYPE_CHECKING:
    from autotune.diagnose.finding import Diagnosis, Finding
    from autotune.profiling.schema import Breakdown, Profile, Spread

# Parts of a metric's time, as a person names them.
_PARTS = {
    "queue": "waiting for a seat",
    "prefill_linear": "prompt: linear layers",
    "prefill_attention": "prompt: attention",
    "interference": "others' prompts",
    "weights": "reading weights",
    "linear_compute": "multiplying",
    "kv_reads": "reading keys and values",
    "drafting": "drafting",
    "verification": "verifying drafts",
    "host": "host",
    "communication": "communication",
    "preempted": "preempted",
    "other": "other device time",
    "idle": "idle",
}
_TITLES = {"ttft": "TTFT", "tpot": "TPOT", "throughput": "Wall time"}
_METRICS = {
    "ttft": "TTFT",
    "tpot": "TPOT",
    "throughput": "Throughput",
    "cost": "Cost",
    "memory": "Memory",
}
_STYLES = {"high": "bold red", "medium": "yellow", "low": "dim"}
_BAR = 30
# Parts smaller than this are left out of the bars.
_LEAST_SHARE = 0.005


def print_profile(profile: Profile, diagnosis: Diagnosis, console: Console | None = None) -> None:
    """Print a profile and its diagnosis; to stdout."""
    console = console or data_console()
    console.print(Text(_headline(profile), style="bold"), soft_wrap=True)
    for line in _metrics(profile):
        console.print(line, markup=False, soft_wrap=not console.is_terminal)
    _print_phases(profile, console)
    for breakdown in profile.breakdowns:
        _print_breakdown(breakdown, console)
    for title, lines in (
        ("KV cache", list(_kv(profile))),
        ("Queue", list(_queue(profile))),
        ("Host", list(_host(profile))),
        ("Speculation", list(speculation_lines(profile))),
        ("GPU", list(_gpu(profile))),
    ):
        if lines:
            _print_block(title, lines, console)
    _print_findings(diagnosis, console)
    lacks = not_known(profile, diagnosis)
    if lacks:
        console.print()
        console.print("[bold]Not known[/]")
        for text in lacks:
            _print_item(Text(text), console)


def _headline(profile: Profile) -> str:
    source, traffic = profile.source, profile.traffic
    model = "" if profile.model is None else f"{profile.model.name}: "
    if source.kind == "metrics":
        where = f"{source.server or 'server'} at {source.where}"
    else:
        where = f"{traffic.requests} requests"
    rate = "" if traffic.rate is None else f", {traffic.rate:.3g}/s"
    text = f"{model}{where} in {traffic.duration_s:.3g} s{rate}"
    missing = [
        f"{count} {what}"
        for count, what in (
            (traffic.refused, "refused"),
            (traffic.failed, "failed"),
            (traffic.timed_out, "timed out"),
        )
        if count
    ]
    return f"{text} ({', '.join(missing)})" if missing else text


def _metrics(profile: Profile) -> Iterator[str]:
    metrics = profile.metrics or {}
    latencies = []
    for name in ("ttft", "tpot"):
        values = metrics.get(name) or {}
        shown = [
            f"{statistic} {_time(values[statistic])}"
            for statistic in ("p50", "p95")
            if values.get(statistic) is not None
        ]
        if shown:
            latencies.append(f"{_METRICS[name]} {', '.join(shown)}")
    tokens = metrics.get("output_tokens_per_s")
    if tokens is not None:
        latencies.append(f"{tokens:.4g} output tokens/s")
    if latencies:
        yield "  ".join(latencies)
    if profile.ceilings is not None:
        c = profile.ceilings
        yield (
            f"Measured ceilings: {c.working_set_bandwidth / 1e9:.3g} GB/s for the weights, "
            f"{c.bandwidth / 1e9:.3g} GB/s from memory, "
            f"{c.matmul[c.compute_dtype] / 1e12:.3g} T{_rate(c.compute_dtype)} in "
            f"{c.compute_dtype}; ridge {c.ridge:.3g} operations/byte"
        )


def _rate(dtype: str) -> str:
    return "OP/s" if dtype.startswith("int") else "FLOP/s"


def _print_phases(profile: Profile, console: Console) -> None:
    if not profile.phases:
        return
    table = Table(box=None, pad_edge=False, title=None)
    headings = ("steps", "time", "count", "p50", "p95", "batch", "op/byte", "MFU", "MBU")
    for heading in (*headings, "bound by"):
        text = heading in ("steps", "bound by")
        table.add_column(heading, justify="left" if text else "right")
    for phase in profile.phases:
        table.add_row(
            phase.name,
            _percent(phase.share),
            str(phase.steps),
            _time(phase.step_p50),
            _time(phase.step_p95),
            f"{phase.mean_batch:.3g}",
            "-" if phase.intensity is None else f"{phase.intensity:.3g}",
            _percent(phase.mfu),
            _percent(phase.mbu),
            phase.bound or "-",
        )
    console.print()
    console.print(table)


def _print_breakdown(breakdown: Breakdown, console: Console) -> None:
    title = _TITLES[breakdown.metric]
    # Over hundreds of requests a sum says nothing; the share of it does.
    seconds = "" if breakdown.metric == "throughput" else f"  mean {_time(breakdown.seconds)}"
    console.print()
    console.print(Text.assemble((title, "bold"), seconds))
    shown = sorted(breakdown.parts.items(), key=lambda part: -part[1])
    for name, share in shown:
        if share >= _LEAST_SHARE:
            bar = Text("█" * max(1, round(share * _BAR)), style="cyan")
            line = Text(f"  {_PARTS.get(name, name):24}{share:>5.0%}  ")
            console.print(line.append_text(bar), soft_wrap=True)


def _kv(profile: Profile) -> Iterator[str]:
    kv = profile.kv
    if kv.occupancy_mean is not None:
        text = f"{kv.occupancy_mean:.0%} of the blocks in use on average"
        if kv.occupancy_peak is not None:
            text += f", {kv.occupancy_peak:.0%} at the peak"
        if kv.seats is not None:
            text += f"; room for {kv.seats:,.0f} mean requests"
        yield text
    if kv.fragmentation is not None:
        yield f"{kv.fragmentation:.0%} of the slots in use hold no token"
    if kv.preemptions:
        yield f"{kv.preemptions} preemptions"
    if kv.refused_for_size:
        yield f"{kv.refused_for_size} requests refused as too long"
    if kv.hit_rate is not None:
        text = f"{kv.hit_rate:.0%} of prompt tokens found in the prefix cache"
        if kv.attainable_hit_rate is not None:
            text += f"; this traffic allows {kv.attainable_hit_rate:.0%}"
        yield text


def _queue(profile: Profile) -> Iterator[str]:
    queueing, traffic = profile.queueing, profile.traffic
    facts = []
    if queueing.busy_share is not None:
        facts.append(f"a step is under way {queueing.busy_share:.0%} of the time")
    if queueing.utilisation is not None:
        # An engine may be busy all the time with steps that are nearly empty.
        facts.append(f"what arrives is {queueing.utilisation:.0%} of what full batches sustain")
    if traffic.arrival_cv is not None:
        facts.append(f"arrivals' variation {traffic.arrival_cv:.2g} (Poisson: 1)")
    if facts:
        yield "; ".join(facts)
    if queueing.wait is not None:
        share = "" if queueing.wait_share is None else f", {queueing.wait_share:.0%} of TTFT"
        yield f"wait {_spread(queueing.wait)}{share}"
    if queueing.running_mean is not None and queueing.queue_mean is not None:
        yield (
            f"{queueing.running_mean:.3g} running and {queueing.queue_mean:.3g} waiting on average"
        )
    if queueing.stable is False and queueing.growth_per_s is not None:
        yield f"not stable: {queueing.growth_per_s:.2g} more requests in the system every second"


def _host(profile: Profile) -> Iterator[str]:
    host, ranks = profile.host, profile.communication
    if host is not None:
        yield (
            f"the device waits for it {host.share:.1%} of step time: {_time(host.per_step_s)} a "
            f"step, of which the scheduler takes {host.scheduler_share:.1%} of step time"
        )
    if ranks is not None and ranks.share is not None:
        yield f"{ranks.ranks} ranks spend {ranks.share:.0%} of device time in collectives"


def _gpu(profile: Profile) -> Iterator[str]:
    gpu = profile.gpu
    if gpu is None:
        return
    if gpu.power_mean_watts is not None:
        limit = "" if gpu.power_limit_watts is None else f" of {gpu.power_limit_watts:.0f}"
        yield f"{gpu.power_mean_watts:.0f}{limit} W on average"
    if gpu.clock_ratio is not None:
        yield f"clock at {gpu.clock_ratio:.0%} of its highest while busy"
    if gpu.throttled_share:
        reasons = ", ".join(name.replace("_", " ") for name in gpu.throttle_reasons)
        yield f"slowed in {gpu.throttled_share:.0%} of the samples: {reasons}"


def _print_findings(diagnosis: Diagnosis, console: Console) -> None:
    console.print()
    line = Text("Bottlenecks", style="bold")
    if diagnosis.binding_limit is not None:
        state = binding_limit(diagnosis.binding_limit, diagnosis.binding_ratio)
        line.append(f"  {state}", style="not bold")
    console.print(line, soft_wrap=True)
    if not diagnosis.findings:
        console.print("  none found")
    for metric, title in _METRICS.items():
        found = diagnosis.of(metric)
        if found:
            console.print(Text(f"  {title}", style="bold"))
        # The first in any case; of the rest what matters, and of small things the names.
        told = [f for f in found if f is found[0] or f.level != "low"]
        for finding in told:
            _print_item(_finding(finding), console, indent=4)
        others = [f"{f.bottleneck} {f.share:.0%}" for f in found if f not in told]
        if others:
            line = Text.assemble(("low    ", _STYLES["low"]), f"also {', '.join(others)}")
            _print_item(line, console, indent=4)


def _finding(finding: Finding) -> Text:
    return Text.assemble(
        (f"{finding.level:7}", _STYLES[finding.level]),
        (finding.bottleneck, "bold"),
        f", {finding.share:.0%}. {finding.sentence}",
    )


def _print_block(title: str, lines: Iterable[str], console: Console) -> None:
    console.print()
    console.print(Text(title, style="bold"))
    for line in lines:
        _print_item(Text(line), console)


def _print_item(text: Text, console: Console, indent: int = 2) -> None:
    if console.is_terminal:
        console.print(Padding(text, (0, 0, 0, indent), expand=False))
    else:  # a line each, for programs that read lines
        console.print(Text(" " * indent).append_text(text), soft_wrap=True)


def _spread(spread: Spread) -> str:
    return f"p50 {_time(spread.p50)}, p95 {_time(spread.p95)}"


def _time(seconds: float) -> str:
    """Milliseconds, or seconds where there are many."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
