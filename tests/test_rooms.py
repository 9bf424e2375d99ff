"""The rooms of the project: who may import whom, and what stays free of torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "engine", "autotune", "reports")
WITHOUT_TORCH = (
    "engine.config",
    "engine.request",
    "engine.batch",
    "engine.blocks",
    "engine.scheduler",
    "engine.engine",
    "autotune.cli.main",
    "autotune.records",
    "autotune.slo",
    "autotune.planning.cost_source",
    "autotune.planning.floors",
    "autotune.planning.read_shape",
)


def allowed(path: Path) -> tuple[str, ...]:
    """Prefixes of the project's modules that a file may import."""
    room = path.relative_to(ROOT).parts[0]
    if path.is_relative_to(ROOT / "autotune" / "cli"):
        return ROOMS
    return {
        "kernels": ("kernels",),
        "engine": ("engine", "kernels"),
        "autotune": ("autotune", "engine", "kernels.limits"),
        "reports": ("reports", "autotune.records"),
    }[room]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import hides its room"
            # `from autotune import slo` imports the module autotune.slo.
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def sources() -> list[Path]:
    return sorted(p for room in ROOMS for p in (ROOT / room).rglob("*.py"))


def test_there_are_sources() -> None:
    assert {p.relative_to(ROOT).parts[0] for p in sources()} == set(ROOMS)


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    for line, name in imports(path):
        if name.split(".")[0] in ROOMS:
            ok = any(name == a or name.startswith(a + ".") for a in allowed(path))
            assert ok, f"{path.relative_to(ROOT)}:{line} imports {name}"


def test_search_spaces_hold_no_code() -> None:
    files = [p for p in (ROOT / "search_spaces").rglob("*") if p.is_file()]
    assert files
    assert {p.suffix for p in files if "__pycache__" not in p.parts} == {".yaml"}


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_module_does_not_import_torch(module: str) -> None:
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
