import io
import json
import sys

import pytest

from autotune.cli.console import complain, data_console, note, print_json, progress_steps


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make both streams one terminal; no fixture, as pytest sets its own streams after those."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    return terminal


def test_colour_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    complain("wrong")
    assert "\x1b[" in terminal.getvalue()
    assert "wrong" in terminal.getvalue()


def test_no_escape_codes_with_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    complain("wrong")
    data_console().print("[bold red]data[/]")
    assert terminal.getvalue() == "Error: wrong\ndata\n"


def test_no_escape_codes_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    complain("wrong " * 40)
    note("[a]")
    with progress_steps() as step:
        step("First")
        step("Second [x]")
    data_console().print("[bold]data[/]")
    out, err = capsys.readouterr()
    assert out == "data\n"
    assert err == "Error: " + "wrong " * 40 + "\n[a]\nFirst\nSecond [x]\n"


def test_progress_on_a_terminal_keeps_off_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    with progress_steps() as step:
        step("Measuring [x]")
    assert "Measuring [x]" in terminal.getvalue()
    assert out.getvalue() == ""


def test_json_is_one_object_with_its_schema_version(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"b": 1.5, "a": None})
    text = capsys.readouterr().out
    assert json.loads(text) == {"schema_version": 1, "b": 1.5, "a": None}
    assert text.endswith("}\n")
    with pytest.raises(ValueError, match="JSON"):
        print_json({"x": float("nan")})
    assert capsys.readouterr().out == ""
