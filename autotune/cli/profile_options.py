"""Options of commands that measure a load or watch a server, shared by those that have them."""

from __future__ import annotations

from typing import Annotated

import typer

from autotune.errors import BadInput

DEFAULT_WINDOW = "60s"

SeedOption = Annotated[int, typer.Option("--seed", help="Drives everything random.")]
PriceOption = Annotated[
    float | None, typer.Option("--price", help="USD per hour of this machine, for cost.")
]
DrainOption = Annotated[
    str,
    typer.Option(
        "--drain",
        help="How long after the last arrival unfinished requests are waited for; after that they "
        "count as timed out.",
    ),
]
MetricsUrlOption = Annotated[
    str | None,
    typer.Option(
        "--metrics-url",
        metavar="URL",
        help="Watch a running vLLM, SGLang or TGI instead of running a load; --model then names "
        "what it serves, for bytes and operations.",
    ),
]
WindowOption = Annotated[
    str, typer.Option("--window", help="With --metrics-url: how long to watch, for instance 60s.")
]


def check_price(price: float | None) -> None:
    """Refuse a price that is none.

    Raises:
        BadInput: it is not above 0.
    """
    if price is not None and not price > 0:
        raise BadInput(f"--price must be above 0, got {price:g}")
