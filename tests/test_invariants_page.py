"""INVARIANTS.md names tests; they must exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMED = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "INVARIANTS.md").read_text())


def test_each_invariant_names_a_test() -> None:
    text = (ROOT / "INVARIANTS.md").read_text(encoding="utf-8")
    for number in range(1, 9):
        section = text.split(f"\n{number}. ")[1].split(f"\n{number + 1}. ")[0]
        assert "`tests/" in section


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_named_test_exists(file: str, name: str) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    defined = {
        node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    assert not name or name in defined
