"""The line about layers: whole from the first moment, and no more than lines off a terminal."""

from __future__ import annotations

import io

from rich.console import Console

from autotune.cli.layer_progress import LayerProgress


def shown(terminal: bool) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=80)
    with LayerProgress(console, "quantizing") as progress:
        progress.layer(0, 2)
        progress.layer(1, 2)
        progress.say("measuring")
    return stream.getvalue()


def test_off_a_terminal_each_line_says_something() -> None:
    lines = shown(terminal=False).splitlines()
    assert lines[0].startswith("quantizing: layer 1 of 2")
    assert lines[1:] == ["measuring"]


def test_no_total_is_shown_before_there_is_one() -> None:
    text = shown(terminal=True)
    assert "layer 1 of 2" in text
    assert "None" not in text
