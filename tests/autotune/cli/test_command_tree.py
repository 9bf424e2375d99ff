"""Every command and every option explains itself; wrong usage ends with 2; help is cheap."""

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from autotune.cli.main import COMMANDS, app


def commands(command: Any = None, path: str = "autotune") -> Iterator[tuple[str, Any]]:
    command = get_command(app) if command is None else command
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, f"{path} {name}")


def parameters() -> list[tuple[str, Any]]:
    return [
        (f"{path} {parameter.name}", parameter)
        for path, command in commands()
        for parameter in command.params
    ]


def test_the_walk_sees_the_commands() -> None:
    assert {path.split()[-1] for path, _ in commands()} == {"autotune", *COMMANDS}
    assert {"doctor", "export"} <= set(COMMANDS)
    assert "autotune export to" in [path for path, _ in parameters()]


@pytest.mark.parametrize(("path", "command"), list(commands()), ids=str)
def test_every_command_has_help(path: str, command: Any) -> None:
    assert command.help
    if path != "autotune":
        room = 80 - len("  ") - max(map(len, COMMANDS)) - len("  ")
        assert not command.get_short_help_str(room).endswith("..."), "is cut off in the list"


@pytest.mark.parametrize(("path", "parameter"), parameters(), ids=str)
def test_every_option_and_argument_has_help(path: str, parameter: Any) -> None:
    assert (getattr(parameter, "help", None) or "").strip(), path


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_flags_end_with_2_and_say_so_on_stderr(name: str) -> None:
    result = CliRunner().invoke(app, [name, "--no-such-flag"])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "--no-such-flag" in result.stderr


def test_an_unknown_command_ends_with_2() -> None:
    result = CliRunner().invoke(app, ["docter"])
    assert result.exit_code == 2
    assert "docter" in result.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command_is_plain_and_whole_at_80_columns(name: str) -> None:
    result = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": ""})
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    for path, parameter in parameters():
        if path.startswith(f"autotune {name} "):
            assert all(option in result.stdout for option in parameter.opts if "-" in option)


def test_version_is_the_installed_one() -> None:
    from importlib.metadata import version

    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"autotune {version('inference-autotune')}\n")


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from autotune.cli.main import main\n"
        "try:\n"
        f"    main({arguments!r})\n"
        "finally:\n"
        "    heavy = {'torch', 'transformers', 'pandas', 'pyarrow', 'optuna', 'scipy',"
        " 'fastapi', 'uvicorn', 'aiohttp', 'prometheus_client'}\n"
        "    sys.stderr.write(','.join(sorted(heavy & set(sys.modules))))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout
    assert result.stderr == ""


def test_the_installed_command_starts() -> None:
    script = os.path.join(os.path.dirname(sys.executable), "autotune")  # noqa: PTH118, PTH120
    result = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    assert "Commands:" in result.stdout
