"""The built-in calibration text is no part of the text that quality is measured on."""

from __future__ import annotations

import re
from pathlib import Path

import engine.quantize
from autotune.embedded import HELD_OUT

SAMPLE = Path(engine.quantize.__path__[0]) / "calibration_sample.txt"
NAME = re.compile(r"^===== (\S+) =====$", re.MULTILINE)


def shared_pieces(a: str, b: str, length: int) -> list[str]:
    """Pieces of `length` characters of `a` that stand in `b`."""
    pieces = {b[start : start + length] for start in range(len(b) - length + 1)}
    every = (a[start : start + length] for start in range(len(a) - length + 1))
    return [piece for piece in every if piece in pieces]


def test_no_file_and_no_200_characters_are_shared_with_the_held_out_text() -> None:
    sample, held_out = SAMPLE.read_text(encoding="utf-8"), HELD_OUT.read_text(encoding="utf-8")
    assert 120_000 <= len(sample) <= 160_000
    names, held_out_names = NAME.findall(sample), NAME.findall(held_out)
    assert len(names) > 20
    assert len(held_out_names) > 10
    assert not set(names) & set(held_out_names)
    assert shared_pieces(sample, held_out, 200) == []
    # The check finds a piece where there is one.
    assert shared_pieces(sample[:500] + held_out[1000:1200], held_out, 200)


def test_the_licence_lies_beside_it() -> None:
    text = (SAMPLE.parent / "LICENSE-PSF").read_text(encoding="utf-8")
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in text
    assert "calibration_sample.txt" in text
