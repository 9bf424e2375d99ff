"""The options that say which traffic to offer, shared by the commands that offer it."""

from __future__ import annotations

from typing import Annotated

import typer

from autotune.cli.durations import parse_duration, parse_rate
from autotune.traffic_options import TrafficOptions

_PANEL = "Traffic"

WorkloadOption = Annotated[
    str,
    typer.Option(
        "--workload",
        help="Trace file (Azure, Mooncake, BurstGPT, ShareGPT, vLLM custom or timed trace, OpenAI "
        "batch) or preset: chat, rag, code, summarize, agent.",
        rich_help_panel=_PANEL,
    ),
]
FormatOption = Annotated[
    str | None,
    typer.Option(
        "--workload-format",
        help="Format of the file; by default recognised from its content.",
        rich_help_panel=_PANEL,
    ),
]
RateOption = Annotated[
    str | None,
    typer.Option(
        "--rate",
        help="Mean arrivals in requests per second, or inf for all at once. Default: a trace's "
        "own; for a preset as --load says.",
        rich_help_panel=_PANEL,
    ),
]
LoadOption = Annotated[
    float | None,
    typer.Option(
        "--load",
        help="Offer this share of the requests per second that the default config sustains when "
        "saturated, found by a calibration; instead of --rate. Default for presets: 1.15.",
        rich_help_panel=_PANEL,
    ),
]
LengthsOption = Annotated[
    float | None,
    typer.Option(
        "--scale-lengths",
        help="Multiply prompt and output lengths by this. Default: 1 for a file; a preset is "
        "scaled to the model's context.",
        rich_help_panel=_PANEL,
    ),
]
DurationOption = Annotated[
    str | None,
    typer.Option(
        "--duration",
        help="Length of one measurement's load, for instance 20s.",
        rich_help_panel=_PANEL,
    ),
]
StartOption = Annotated[
    str,
    typer.Option(
        "--start",
        help="Skip so much of the trace, in its own time, for instance 10m.",
        rich_help_panel=_PANEL,
    ),
]
RequestsOption = Annotated[
    int | None,
    typer.Option("--requests", help="Most requests of one measurement.", rich_help_panel=_PANEL),
]
BurstinessOption = Annotated[
    float,
    typer.Option(
        "--burstiness",
        help="Shape of a preset's Gamma arrivals: 1 is Poisson, less is burstier.",
        rich_help_panel=_PANEL,
    ),
]

KeepGridOption = Annotated[
    bool,
    typer.Option(
        "--keep-grid",
        help="Replay a trace's coarsely recorded arrivals as bursts instead of spreading them.",
        rich_help_panel=_PANEL,
    ),
]


def traffic_options(
    workload: str,
    workload_format: str | None,
    rate: str | None,
    load: float | None,
    scale_lengths: float | None,
    duration: str | None,
    start: str,
    requests: int | None,
    burstiness: float,
    keep_grid: bool,
) -> TrafficOptions:
    """The traffic that these options describe.

    Raises:
        BadInput: an option that is no duration or rate, or a contradiction.
    """
    return TrafficOptions(
        source=workload,
        format=workload_format,
        rate=None if rate is None else parse_rate(rate, "--rate"),
        load_factor=load,
        length_factor=scale_lengths,
        duration_s=None if duration is None else parse_duration(duration, "--duration"),
        start_s=0.0 if start in ("0", "0s") else parse_duration(start, "--start"),
        requests=requests,
        burstiness=burstiness,
        keep_grid=keep_grid,
    )
