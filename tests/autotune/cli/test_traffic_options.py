"""The options of traffic as commands get them."""

from __future__ import annotations

from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from autotune.cli.traffic_options import TRAFFIC_PARAMETERS, with_traffic
from autotune.traffic_options import TrafficOptions

SEEN: list[TrafficOptions] = []


def command(duration: str | None = None) -> typer.Typer:
    SEEN.clear()
    app = typer.Typer()

    @app.command()
    @with_traffic(duration=duration)
    def offer(
        other: Annotated[int, typer.Option("--other")] = 1, *, traffic: TrafficOptions
    ) -> None:
        """Offer."""
        assert other in (1, 2)
        SEEN.append(traffic)

    return app


def test_without_options_it_is_the_chat_preset_for_the_commands_duration() -> None:
    assert CliRunner().invoke(command("20s"), []).exit_code == 0
    assert [TrafficOptions(duration_s=20.0)] == SEEN
    assert CliRunner().invoke(command(), []).exit_code == 0
    assert [TrafficOptions()] == SEEN


def test_every_option_reaches_its_field() -> None:
    given = (
        *("--workload", "t.csv", "--workload-format", "azure", "--rate", "inf"),
        *("--scale-lengths", "0.5", "--duration", "1m", "--start", "10s", "--requests", "7"),
        *("--burstiness", "0.3", "--keep-grid", "--other", "2"),
    )
    assert CliRunner().invoke(command(), list(given)).exit_code == 0
    assert [
        TrafficOptions(
            source="t.csv",
            format="azure",
            rate=float("inf"),
            length_factor=0.5,
            duration_s=60.0,
            start_s=10.0,
            requests=7,
            burstiness=0.3,
            keep_grid=True,
        )
    ] == SEEN
    assert CliRunner().invoke(command(), ["--load", "0.7"]).exit_code == 0
    assert SEEN[0].load_factor == 0.7


def test_parameters_are_those_of_the_command_line() -> None:
    (offer,) = typer.main.get_command(command()).params[1:2]
    assert offer.name == TRAFFIC_PARAMETERS[0]
    names = [p.name for p in typer.main.get_command(command()).params]
    assert [name for name in names if name in TRAFFIC_PARAMETERS] == list(TRAFFIC_PARAMETERS)


def test_command_without_a_place_for_them_is_refused() -> None:
    def nothing() -> None: ...

    with pytest.raises(TypeError, match="needs a parameter `traffic`"):
        with_traffic()(nothing)
