"""Every error ends as one sentence on stderr and the documented exit code."""

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from autotune.cli.exits import ExitCode, explain, guarded
from autotune.errors import AutotuneError, BadInput, EnvironmentMissing, Interrupted
from engine.errors import ConfigError, EngineError, EnvironmentLacks, ModelError, RequestRefused


class OutOfMemoryError(RuntimeError):
    """As torch names its own."""


ERRORS: list[tuple[BaseException, int, str]] = [
    (BadInput("the trace is empty"), 2, "the trace is empty"),
    (ConfigError("block_size=17 is not one of 8, 16"), 2, "block_size=17 is not one of 8, 16"),
    (ModelError("no config.json in x"), 2, "no config.json in x"),
    (RequestRefused("too long"), 2, "too long"),
    (EnvironmentMissing("no GPU"), 3, "no GPU"),
    (EnvironmentLacks("no memory"), 3, "no memory"),
    (OSError(errno.ENOSPC, "No space left on device", "a/run.json"), 3, "No space is left"),
    (OSError(errno.EDQUOT, "Disk quota exceeded", "a/run.json"), 3, "a/run.json"),
    (PermissionError(errno.EACCES, "Permission denied", "a/b"), 3, "a/b"),
    (OSError(errno.EROFS, "Read-only file system", "a/b"), 3, "read-only"),
    (MemoryError(), 3, "out of memory"),
    (OutOfMemoryError("CUDA out of memory. Tried\nmore"), 3, "CUDA out of memory. Tried"),
    (Interrupted("stopped; resume with --resume"), 130, "resume with --resume"),
    (KeyboardInterrupt(), 130, "Interrupted"),
    (AutotuneError("broken table"), 1, "broken table"),
    (EngineError("odd"), 1, "odd"),
    (ValueError("first line\nsecond"), 1, "fault of ours: ValueError: first line"),
    (KeyError("x"), 1, "fault of ours: KeyError: 'x'"),
    (RuntimeError(), 1, "fault of ours: RuntimeError"),
]


@pytest.mark.parametrize(("error", "code", "sentence"), ERRORS)
def test_each_error_has_its_code_and_one_line(
    error: BaseException, code: int, sentence: str
) -> None:
    found, message = explain(error)
    assert found == code
    assert sentence in message
    assert "\n" not in message


def command_raising(error: BaseException) -> typer.Typer:
    app = typer.Typer(rich_markup_mode=None)

    @app.command()
    @guarded
    def work() -> None:
        """Work."""
        raise error

    return app


@pytest.mark.parametrize(("error", "code", "sentence"), ERRORS)
def test_guarded_commands_write_to_stderr_and_show_no_traceback(
    error: BaseException,
    code: int,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = CliRunner().invoke(command_raising(error))
    assert result.exit_code == code
    assert result.stdout == ""
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr
    saved = list(tmp_path.glob("autotune-fault-*"))
    assert len(saved) == (code == ExitCode.FAULT)
    for path in saved:
        assert str(path) in result.stderr
        assert "Traceback" in path.read_text()


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOTUNE_DEBUG", "1")
    result = CliRunner().invoke(command_raising(ValueError("odd")))
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    monkeypatch.setenv("AUTOTUNE_DEBUG", "0")
    result = CliRunner().invoke(command_raising(BadInput("odd")))
    assert "Traceback" not in result.stderr


def test_typers_own_exits_pass_through() -> None:
    assert CliRunner().invoke(command_raising(typer.Exit(4))).exit_code == 4
    result = CliRunner().invoke(command_raising(typer.BadParameter("not so")))
    assert result.exit_code == 2
    assert "not so" in result.stderr


def test_markup_in_a_message_is_text() -> None:
    result = CliRunner().invoke(command_raising(BadInput("expected [bold] in [/x] of [1, 2]")))
    assert "expected [bold] in [/x] of [1, 2]" in result.stderr


@pytest.mark.skipif(os.name != "posix", reason="signals and pipes of POSIX")
@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGINT); time.sleep(5)", 130),
        ("sys.stdout.write('x' * 10_000_000); sys.stdout.flush()", 141),
    ],
)
def test_interrupts_and_closed_pipes_end_quietly(tmp_path: Path, body: str, code: int) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys, time
            from autotune.cli import main

            def work() -> None:
                '''Work.'''
                {body}

            main.app.command("work")(main.guarded(work))
            main.main(["work"])
            """
        )
    )
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    message = process.stderr.read()
    process.stderr.close()
    assert process.wait(30) == code
    assert "Traceback" not in message
    assert message == ("Error: Interrupted.\n" if code == 130 else "")
