"""Files as a person gets them, compared whole.

After a wanted change: `UPDATE_GOLDEN=1 pytest tests/autotune/deploy/platforms`, then read the
difference. The engines' own files are compared beside the engines' exports. Scripts that hardly
differ from target to target are held whole once, and as differences from that of the others.
"""

import difflib
import os
from collections import defaultdict
from pathlib import Path

import pytest

from autotune.deploy.targets import all_targets
from tests.autotune.deploy.platforms.exported_runs import exported

GOLDEN = Path(__file__).parent / "golden"
ENGINE_FILES = {"vllm.yaml", "sglang.yaml", "engine.yaml"}
APPROVED = [
    ("cpu", "compose", "vllm"),
    ("gpus", "compose", "sglang"),
    ("cpu", "compose", "engine"),
    ("cpu", "kubernetes", "vllm"),
    ("gpus", "kubernetes", "vllm"),
    ("gpus", "kserve", "vllm"),
    ("cpu", "kserve", "engine"),
    ("gpus", "helm", "vllm"),
    ("cpu", "helm", "vllm"),
    ("gpus", "ray-serve", "vllm"),
    ("cpu", "ray-serve", "vllm"),
    ("gpus", "dynamo", "vllm"),
    ("gpus", "nim", "vllm"),
    ("gpus", "skypilot", "vllm"),
    ("cpu", "systemd", "engine"),
]
# Files that are held whole once, each of the export that it is held of.
ONCE = {
    "smoke_test.sh": ("cpu", "compose", "vllm"),
    "benchmark.sh": ("cpu", "compose", "vllm"),
    "Dockerfile": ("cpu", "compose", "engine"),
}


def approve(path: Path, text: str) -> None:
    """Hold what was approved, or compare with it."""
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert text == path.read_text(), path.name


@pytest.mark.parametrize(("run", "target", "engine"), APPROVED)
def test_files_are_as_they_were_read_and_approved(run: str, target: str, engine: str) -> None:
    folder = GOLDEN / f"{run}-{target}-{engine}"
    files = exported(run, target, engine).files
    own = {name: text for name, text in files.items() if name not in ENGINE_FILES | set(ONCE)}
    for name, text in own.items():
        approve(folder / name, text)
    assert sorted(own) == sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ONCE)
def test_what_hardly_differs_is_approved_once_and_by_its_differences(name: str) -> None:
    whole = exported(*ONCE[name]).files[name]
    approve(GOLDEN / "scripts" / name, whole)
    engines = [(run, engine, None) for run in ("cpu", "gpus") for engine in _engines()]
    alike = defaultdict(list)
    for run, target, engine in (*APPROVED, *engines):
        text = exported(run, target, engine).files.get(name)
        if text is not None:
            export = "-".join(filter(None, (run, target, engine)))
            alike[_difference(whole, text)].append(export)
    sections = [f"=== {' '.join(sorted(exports))}\n{lines}" for lines, exports in alike.items()]
    approve(GOLDEN / "scripts" / f"{name}.differences", "".join(sorted(sections)))


def _engines() -> list[str]:
    return [name for name, target in all_targets().items() if not target.carries]


def _difference(whole: str, other: str) -> str:
    lines = difflib.unified_diff(whole.splitlines(), other.splitlines(), n=0, lineterm="")
    return "".join(f"{line}\n" for line in list(lines)[2:])
