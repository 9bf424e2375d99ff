"""The command `autotune`: one file a command, put together here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer
from typer.main import get_command

from autotune.cli.advise import advise
from autotune.cli.bench import bench
from autotune.cli.doctor import doctor
from autotune.cli.exits import ExitCode, guarded, report
from autotune.cli.export import export
from autotune.cli.plan import plan
from autotune.cli.profile import profile
from autotune.cli.quantize import quantize
from autotune.cli.report import report as report_command
from autotune.cli.run import run
from autotune.cli.serve import serve
from autotune.cli.simulate import simulate
from autotune.cli.train_medusa import train_medusa

app = typer.Typer(
    name="autotune",
    help="Find where LLM serving time goes, search the engine's knobs by measurement, prove the "
    "winner; predict loads without running them, and plan GPUs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Boxes cut off long option names at 80 columns; plain help never does.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# In the order in which `--help` lists them.
COMMANDS: dict[str, Callable[..., None]] = {
    "run": run,
    "profile": profile,
    "advise": advise,
    "bench": bench,
    "serve": serve,
    "simulate": simulate,
    "plan": plan,
    "quantize": quantize,
    "train-medusa": train_medusa,
    "export": export,
    "report": report_command,
    "doctor": doctor,
}
for _name, _command in COMMANDS.items():
    app.command(_name)(guarded(_command))


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"autotune {version('inference-autotune')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Find where LLM serving time goes, search the engine's knobs by measurement, prove it."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code; the entry point of `autotune`."""
    command = get_command(app)
    try:
        command.main(args=arguments, prog_name="autotune", standalone_mode=True)
    except KeyboardInterrupt:
        raise SystemExit(ExitCode.INTERRUPTED) from None
    except Exception as error:
        raise SystemExit(report(error)) from None


if __name__ == "__main__":
    main()
