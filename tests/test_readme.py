"""What README.md says is true: its speeds are those on file, its commands exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from autotune.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = {
    "decode, batch 1": "decode_batch_1",
    "decode, batch 32": "decode_batch_32",
    "prefill, 1 × 256": "prefill_1x256",
    "prefill, 8 × 256": "prefill_8x256",
}


@pytest.mark.parametrize("label", ROWS)
def test_speeds_are_those_on_file(label: str) -> None:
    file = re.search(r"`(benchmarks/results/\S+/engine_speed\.json)`", README)
    assert file is not None
    results = json.loads((ROOT / file[1]).read_text())[ROWS[label]]
    row = re.search(rf"^\| {re.escape(label)} \| (.+) \|$", README, re.MULTILINE)
    assert row is not None
    expected = [f"{results['transformers']['median_s'] * 1e3:.1f}"] + [
        f"{results[m]['median_s'] * 1e3:.1f} ({results[m]['speedup']:.2f}×)"
        for m in ("none", "int8", "int4")
    ]
    assert row[1].split(" | ") == expected


def test_commands_in_the_readme_exist() -> None:
    commands = set(re.findall(r"^    (?:\.venv/bin/)?autotune (\w+)", README, re.MULTILINE))
    assert commands
    assert commands <= set(COMMANDS)


def test_linked_files_exist() -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
