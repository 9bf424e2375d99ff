"""The options that say which traffic to offer, shared by the commands that offer it.

    @with_traffic(duration="20s")
    def bench(..., *, traffic: TrafficOptions) -> None: ...

`traffic` then holds what the options say. Stacks with `with_knobs`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from autotune.cli.durations import parse_duration, parse_rate
from autotune.traffic_options import TrafficOptions

_PANEL = "Traffic"

_WorkloadOption = Annotated[
    str,
    typer.Option(
        "--workload",
        help="Trace file (Azure, Mooncake, BurstGPT, ShareGPT, vLLM custom or timed trace, OpenAI "
        "batch) or preset: chat, rag, code, summarize, agent.",
        rich_help_panel=_PANEL,
    ),
]
_FormatOption = Annotated[
    str | None,
    typer.Option(
        "--workload-format",
        help="Format of the file; by default recognised from its content.",
        rich_help_panel=_PANEL,
    ),
]
_RateOption = Annotated[
    str | None,
    typer.Option(
        "--rate",
        help="Mean arrivals in requests per second, or inf for all at once. Default: a trace's "
        "own; for a preset as --load says.",
        rich_help_panel=_PANEL,
    ),
]
_LoadOption = Annotated[
    float | None,
    typer.Option(
        "--load",
        help="Offer this share of the requests per second that the default config sustains when "
        "saturated, found by a calibration; instead of --rate. Default for presets: 1.15.",
        rich_help_panel=_PANEL,
    ),
]
_LengthsOption = Annotated[
    float | None,
    typer.Option(
        "--scale-lengths",
        help="Multiply prompt and output lengths by this. Default: 1 for a file; a preset is "
        "scaled to the model's context.",
        rich_help_panel=_PANEL,
    ),
]
_DurationOption = Annotated[
    str | None,
    typer.Option(
        "--duration",
        help="Length of one measurement's load, for instance 20s.",
        rich_help_panel=_PANEL,
    ),
]
_StartOption = Annotated[
    str,
    typer.Option(
        "--start",
        help="Skip so much of the trace, in its own time, for instance 10m.",
        rich_help_panel=_PANEL,
    ),
]
_RequestsOption = Annotated[
    int | None,
    typer.Option("--requests", help="Most requests of one measurement.", rich_help_panel=_PANEL),
]
_BurstinessOption = Annotated[
    float,
    typer.Option(
        "--burstiness",
        help="Shape of a preset's Gamma arrivals: 1 is Poisson, less is burstier.",
        rich_help_panel=_PANEL,
    ),
]
_KeepGridOption = Annotated[
    bool,
    typer.Option(
        "--keep-grid",
        help="Replay a trace's coarsely recorded arrivals as bursts instead of spreading them.",
        rich_help_panel=_PANEL,
    ),
]


# Parameter, its annotation and its default; `--duration` has that of the command.
_OPTIONS: tuple[tuple[str, Any, Any], ...] = (
    ("workload", _WorkloadOption, "chat"),
    ("workload_format", _FormatOption, None),
    ("rate", _RateOption, None),
    ("load", _LoadOption, None),
    ("scale_lengths", _LengthsOption, None),
    ("duration", _DurationOption, None),
    ("start", _StartOption, "0s"),
    ("requests", _RequestsOption, None),
    ("burstiness", _BurstinessOption, 1.0),
    ("keep_grid", _KeepGridOption, False),
)
TRAFFIC_PARAMETERS = tuple(name for name, _, _ in _OPTIONS)


def with_traffic(
    *, duration: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a Typer command the options of traffic, collected into its parameter `traffic`.

    Arguments:
        duration: the command's default of `--duration`.

    Raises:
        TypeError: the command has no keyword parameter `traffic` to receive them.
    """
    added = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=duration if name == "duration" else default,
            annotation=annotation,
        )
        for name, annotation, default in _OPTIONS
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        if "traffic" not in signature.parameters:
            raise TypeError(f"{command.__name__} needs a parameter `traffic` to receive them")

        @functools.wraps(command)
        def run(**given: Any) -> None:
            options = {name: given.pop(name) for name in TRAFFIC_PARAMETERS}
            command(**given, traffic=traffic_options(options))

        own = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in signature.parameters.items()
            if name != "traffic"
        ]
        # Typer reads the annotations beside the signature; both must tell the same.
        run.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in [*own, *added]} | {"return": None}
        return run

    return decorate


def traffic_options(given: Mapping[str, Any]) -> TrafficOptions:
    """The traffic that these options, by parameter, describe.

    Raises:
        BadInput: an option that is no duration or rate, or a contradiction.
    """
    rate, duration, start = given["rate"], given["duration"], given["start"]
    return TrafficOptions(
        source=given["workload"],
        format=given["workload_format"],
        rate=None if rate is None else parse_rate(rate, "--rate"),
        load_factor=given["load"],
        length_factor=given["scale_lengths"],
        duration_s=None if duration is None else parse_duration(duration, "--duration"),
        start_s=0.0 if start in ("0", "0s") else parse_duration(start, "--start"),
        requests=given["requests"],
        burstiness=given["burstiness"],
        keep_grid=given["keep_grid"],
    )
